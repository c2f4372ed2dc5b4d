"""What is given for secret options: others on the machine must not see it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from library.cli import parse
from library.errors import UserError
from library.options import TRAINING, HubOptions
from tests.hub_stand_in import TOKEN
from tests.processes import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the arguments as they were")
@pytest.mark.parametrize("flag", ["--huggingface_token", "--wandb_api_key"])
def test_no_secret_is_in_the_list_of_processes(flag):
    code = """
        import sys
        from library import cli, options
        cli.parse(options.TRAINING, description="")
        print(sys.argv[1:], flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), flag, TOKEN, f"--output_name={TOKEN}", "--cache_latents"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        stars = "*" * len(TOKEN)
        shown = process.stdout.readline()
        listed = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        _, said = process.communicate("")
    assert shown == f"{[flag, stars, f'--output_name={stars}', '--cache_latents']}\n"
    assert listed[-5:] == [flag, stars, f"--output_name={stars}", "--cache_latents", ""]
    assert f"{flag}: others may see it in the list of processes" in said
    assert TOKEN not in said


def test_the_token_is_in_no_listing_of_settings(fresh_console, tmp_path, capsys):
    words = ["--huggingface_token", TOKEN, "--huggingface_repo_id", "me/my-lora"]
    settings = parse(TRAINING, words, description="")
    assert settings[HubOptions].token == TOKEN
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(settings.flat())
    with pytest.raises(SystemExit):
        parse(TRAINING, [*words, "--config_file", str(tmp_path / "all"), "--output_config"], description="")
    assert "me/my-lora" in (tmp_path / "all.toml").read_text()
    assert TOKEN not in (tmp_path / "all.toml").read_text()
    (tmp_path / "bad.toml").write_text(f"huggingface_token = ['{TOKEN}']")
    with pytest.raises(UserError, match="huggingface_token: its value is not a text") as caught:
        parse(TRAINING, ["--config_file", str(tmp_path / "bad.toml")], description="")
    assert TOKEN not in str(caught.value) + capsys.readouterr().err
