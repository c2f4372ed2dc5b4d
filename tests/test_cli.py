"""Command line and config file to settings."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from library import options
from library.cli import parse, run
from library.errors import UserError
from library.options import ConfigOptions, DatasetOptions, NetworkOptions, OptimizerOptions, TrainingOptions, option
from tests import processes
from tests.processes import ROOT, python

GROUPS = [options.NetworkOptions, *options.TRAINING, options.SdxlOptions]

pytestmark = pytest.mark.usefixtures("fresh_console")


def read(*argv: str, groups=GROUPS, **keywords) -> options.Settings:
    return parse(groups, argv, description="Train.", **keywords)


# --- the command line ---


def test_values_defaults_and_given():
    settings = read("--learning_rate", "1e-4", "--shuffle_caption", "--keep_tokens=0", "--dataset_config", "a.toml")
    assert settings[OptimizerOptions].learning_rate == 1e-4
    assert settings[DatasetOptions].shuffle_caption is True
    assert settings[DatasetOptions].dataset_config == Path("a.toml")
    assert settings[DatasetOptions].caption_extension == ".caption"
    assert settings.given == {"learning_rate", "shuffle_caption", "keep_tokens", "dataset_config"}
    flat = settings.flat()
    assert flat["learning_rate"] == 1e-4
    assert flat["max_train_steps"] == 1600
    shown = [field for group in GROUPS for field in options.options_of(group) if not field.details.secret]
    assert flat.keys() == {field.name for field in shown}


def test_several_values():
    settings = read("--network_args", "conv_dim=4", "betas=.9,.999", "--text_encoder_lr", "1e-5", "2e-5")
    assert settings[NetworkOptions].network_args == ("conv_dim=4", "betas=.9,.999")
    assert settings[NetworkOptions].text_encoder_lr == (1e-5, 2e-5)


@dataclasses.dataclass(frozen=True)
class _Words:
    title: ClassVar[str] = "words"

    source: str | None = option(None, "where from", positional=True)
    target: str | None = option(None, "where to", positional=True)
    fast: bool = option(False, "be quick")


def test_words_without_a_flag(capsys):
    words = read("--fast", "in.ckpt", "out", groups=[_Words])[_Words]
    assert words == _Words("in.ckpt", "out", True)
    with pytest.raises(UserError, match=r"required: target$"):
        read("in.ckpt", groups=[_Words])
    with pytest.raises(UserError, match=r"^'more' belongs to no option"):
        read("in.ckpt", "out", "more", groups=[_Words])
    with pytest.raises(UserError, match=r"--fst: unknown option, did you mean --fast\?$"):
        read("in.ckpt", "out", "--fst", groups=[_Words])
    with pytest.raises(SystemExit):
        read("--help", groups=[_Words])
    assert "source target [options]" in capsys.readouterr().out


def test_the_quoted_list_of_the_guide():
    word = "scale_parameter=False,relative_step=False,warmup_init=False"  # what is left when the shell took the quotes
    keywords = read(f"--optimizer_args={word}")[OptimizerOptions].optimizer_keywords
    assert keywords == {"scale_parameter": "False", "relative_step": "False", "warmup_init": "False"}


def test_old_spelling():
    settings = read("--caption_extention", ".txt")
    assert settings[DatasetOptions].caption_extension == ".txt"
    assert settings.given == {"caption_extension"}


def test_a_script_has_its_own_defaults(capsys):
    settings = read(defaults={"train_batch_size": 2})
    assert settings[DatasetOptions].train_batch_size == 2
    assert not settings.given
    with pytest.raises(SystemExit):
        read("--help", defaults={"train_batch_size": 77})
    assert "[77]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no group: train_batch"):
        read(defaults={"train_batch": 2})


@pytest.mark.parametrize(
    ("group", "flag", "sentence"),
    [
        (
            options.DreamBoothOptions,
            "--network_dim",
            "this script has no such option, but train_network.py and sdxl_train_network.py",
        ),
        (
            options.DreamBoothOptions,
            "--train_text_encoder",
            "leave it out, this script trains it unless --stop_text_encoder_training -1 is given",
        ),
        (
            options.SdxlFineTuneOptions,
            "--learning_rate_te",
            "unknown option, did you mean --learning_rate_te1 or --learning_rate_te2?",
        ),
    ],
)
def test_flags_of_other_scripts_are_known(group, flag, sentence):
    with pytest.raises(UserError) as mistake:
        read(flag, "1", groups=[group, *options.TRAINING])
    assert str(mistake.value) == f"{flag}: {sentence}"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learning_rat", "1e-4"], "--learning_rat: unknown option, did you mean --learning_rate?"),
        (["--learning_rat=1e-4"], "--learning_rat: unknown option, did you mean --learning_rate?"),
        (["--learning-rate", "1"], "--learning-rate: unknown option, did you mean --learning_rate?"),
        (["-learning_rate", "1"], "-learning_rate: unknown option, did you mean --learning_rate?"),
        (["--xyzzy"], "--xyzzy: unknown option"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--learning_rate", "nan"], "--learning_rate: 'nan' is not a number"),
        (["--learning_rate", "-1e-4"], "--learning_rate: expected one argument"),
        (["--learning_rate=-1e-4"], "--learning_rate: -1e-4 is too small, use 0 or more"),
        (["--max_train_steps", "1.5"], "--max_train_steps: '1.5' is not a whole number"),
        (["--max_train_steps", "0"], "--max_train_steps: 0 is too small, use 1 or more"),
        (["--mixed_precision", "fp61"], "--mixed_precision: 'fp61' is none of no, fp16, bf16, did you mean fp16?"),
        (["--dataset_config", ""], "--dataset_config: '' is not a path"),
        (["--output_name"], "--output_name: expected one argument"),
        (["--output_name", "a", "b"], "'b' belongs to no option, put values with spaces in quotes"),
        (
            ["--output_name", "True", "--cache_latents", "True"],
            "--cache_latents: this flag takes no value, leave out 'True'",
        ),
        (["--ema=yes"], "--ema: this flag takes no value, leave out 'yes'"),
        (["--text_encoder_lr", "1", "x"], "--text_encoder_lr: 'x' is not a number"),
        (
            ["--optimizer_type", "Prodigal"],
            "--optimizer_type: Prodigal is none of those in --help, no class of torch.optim, and not written as "
            "module.Class, did you mean Prodigy?",
        ),
        (
            ["--ema_decay", "1"],
            "--ema_decay: at 1.0 the average would never move, use a number below 1, such as 0.9999",
        ),
        (["--output_config"], "--output_config: the file to write is not named, add --config_file NAME.toml"),
    ],
)
def test_a_mistake_is_one_sentence(argv, sentence, capsys):
    with pytest.raises(UserError) as mistake:
        read(*argv)
    assert str(mistake.value) == sentence
    assert capsys.readouterr() == ("", "")


def test_help_is_quick_and_imports_nothing_heavy():
    result = python(
        """
        import sys, time
        from library import options
        from library.cli import parse
        groups = [options.NetworkOptions, *options.TRAINING, options.SdxlOptions]
        try:
            parse(groups, ["--help"], description="Train.")
        except SystemExit as end:
            assert not end.code
        heavy = {"torch", "numpy", "toml", "diffusers", "transformers", "PIL"} & sys.modules.keys()
        assert not heavy, heavy
        print(f"CPU seconds: {time.process_time()}", file=sys.stderr)
        """,
        COLUMNS="100",
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stderr.split(":")[1]) < 0.5
    for group in GROUPS:
        assert f"\n{group.title}:\n" in result.stdout
        for one in options.options_of(group):
            assert f"--{one.name}" in result.stdout
    assert "caption_extention" not in result.stdout


SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "tools") for path in folder.glob("*.py"))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "quickstart" not in script])
def test_every_script_starts(script):
    result = processes.run([sys.executable, script, "--help"], 60)
    assert result.returncode == 0, result.stderr
    assert f"usage: {Path(script).name}" in result.stdout
    assert not result.stderr


def test_exit_status():
    code = """
    from library.cli import run
    from library.errors import UserError
    def main():
        raise {}
    run(main)
    """
    mistake = python(code.format("UserError('a.txt: no such file')"))
    assert (mistake.returncode, mistake.stdout, mistake.stderr) == (2, "", "error: a.txt: no such file\n")
    other_process = python(code.format("UserError('a.txt: no such file')"), RANK="3")
    assert (other_process.returncode, other_process.stderr) == (2, "error (process 3): a.txt: no such file\n")
    stopped = python(code.format("KeyboardInterrupt"))
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("error: interrupted")
    killed = python(code.format("__import__('signal').raise_signal(15)"))
    assert (killed.returncode, killed.stderr) == (143, "")
    late = "import atexit, signal\nfrom library.cli import run\natexit.register(signal.raise_signal, 15)\nrun(print)"
    assert (ended := python(late)).returncode == -15
    assert not ended.stderr
    missing = python(code.format("ModuleNotFoundError(name='torch.nn')"))
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: the package torch.nn is not installed for this Python: run ")
    assert missing.stderr.endswith("requirements.txt\n")
    ours = python(code.format("ModuleNotFoundError(name='library.wrong')"))
    assert ours.returncode == 1
    assert "Traceback" in ours.stderr
    crash = python(code.format("RuntimeError('a bug')"))
    assert crash.returncode == 1
    assert "Traceback" in crash.stderr
    assert run(lambda: None) is None


# --- the config file ---


def test_config_file(tmp_path, capsys):
    path = tmp_path / "run.v1.toml"
    path.write_text(
        """
        output_name = 2024
        [training.inner]
        learning_rate = "1e-4"      # text, as some front ends write it
        max_train_steps = 500.0
        train_batch_size = "4"
        max_grad_norm = 2
        [network]
        network_args = ["block_lr_zero_threshold=0.1", "down_lr_weight=0,0,1"]
        text_encoder_lr = 1e-5
        cache_latents = true
        flip_aug = false
        caption_extention = ".txt"
        lr_warmup_steps = 0.1
        dataset_config = "data.toml"
        seed = ""
        """,
        encoding="utf-8-sig",
    )
    for name in (path, path.with_suffix("")):
        settings = read("--config_file", str(name), "--max_grad_norm", "0.5")
        flat = settings.flat()
        assert flat["output_name"] == "2024"
        assert flat["learning_rate"] == 1e-4
        assert flat["max_train_steps"] == 500
        assert type(flat["max_train_steps"]) is int
        assert flat["train_batch_size"] == 4
        assert flat["max_grad_norm"] == 0.5
        assert flat["network_args"] == ("block_lr_zero_threshold=0.1", "down_lr_weight=0,0,1")
        assert flat["text_encoder_lr"] == (1e-5,)
        assert flat["cache_latents"] is True
        assert flat["flip_aug"] is False
        assert flat["caption_extension"] == ".txt"
        assert flat["lr_warmup_steps"] == 0.1
        assert flat["dataset_config"] == Path("data.toml")
        assert flat["seed"] is None
        assert {"flip_aug", "max_grad_norm", "caption_extension", "config_file"} <= settings.given
        assert "seed" not in settings.given
    assert capsys.readouterr().err == ""


def test_unknown_keys_are_warned_of_once(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text("learning_rat = 1\nLoRA_type = 'x'\noutput_config = true\n[a]\nseed = 1\n[b]\nseed = 2\n")
    for _ in range(2):
        assert read("--config_file", str(path))[TrainingOptions].seed == 2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}: learning_rat is not an option of this script and is ignored, did you mean learning_rate?",
        f"warning: {path}: LoRA_type is not an option of this script and is ignored, did you mean loss_type?",
        f"warning: {path}: output_config only works on the command line and is ignored",
        f"warning: {path}: seed is set more than once, the last value counts",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate = 'fast'", "learning_rate: 'fast' is not a number"),
        ("learning_rate = true", "learning_rate: True is not a number"),
        ("max_train_steps = 1.5", "max_train_steps: '1.5' is not a whole number"),
        ("cache_latents = 'yes'", "cache_latents: 'yes' is neither true nor false"),
        ("resolution = [512, 512]", r"resolution: \[512, 512\] is not a text"),
        ("network_args = [['a']]", r"network_args: \['a'\] is not a text"),
        ("mixed_precision = 'fp61'", "mixed_precision: 'fp61' is none of no, fp16, bf16, did you mean fp16"),
        ("[[datasets]]\nresolution = 512", "this file describes datasets, give it as --dataset_config"),
    ],
)
def test_config_file_mistakes_name_file_and_key(tmp_path, text, sentence):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {sentence}"):
        read("--config_file", str(path))


def test_config_file_that_cannot_be_read(tmp_path):
    (tmp_path / "train.toml").touch()
    with pytest.raises(UserError, match=r"trian\.toml: there is no such config file, did you mean .*train\.toml\?$"):
        read("--config_file", str(tmp_path / "trian"))
    (tmp_path / "train.toml").write_bytes(b"output_name = '\xff'")
    with pytest.raises(UserError, match=r"train\.toml, line 1: this config file is not UTF-8 text"):
        read("--config_file", str(tmp_path / "train"))


@dataclasses.dataclass(frozen=True)
class UploadOptions:
    """A group with a secret."""

    title: ClassVar[str] = "upload"
    token: str | None = option(None, "a secret", secret=True)
    repository: str | None = option(None, "no secret")


def test_output_config_is_read_back_and_holds_no_secret(tmp_path, capsys):
    groups = [*GROUPS, UploadOptions]
    words = ["--network_args", "a=1", "b=.9,.999", "--text_encoder_lr", "1e-5", "--dataset_config", "data.toml"]
    words += [
        "--training_comment",
        'a "quoted" C:\\new\\x41\\u0041 \u7d75 name',
        "--flip_aug",
        "--learning_rate",
        "2e-06",
    ]
    words += ["--token", "hush", "--repository", "me/it"]
    name = str(tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        read(*words, "--config_file", name, "--output_config", groups=groups)
    assert end.value.code == 0
    path = tmp_path / "out.toml"
    assert capsys.readouterr().err == f"settings written to {path}\n"
    text = path.read_text(encoding="utf-8")
    assert "hush" not in text
    assert "config_file" not in text
    assert "output_config" not in text
    wanted = read(*words, groups=groups).flat()
    found = read("--config_file", name, groups=groups).flat()
    assert found | {"config_file": None} == wanted

    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: this file exists and is not overwritten"):
        read("--config_file", name, "--output_config", groups=groups)
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(UserError, match="this config file cannot be written"):
        read("--config_file", str(tmp_path / "missing" / "a.toml"), "--output_config")


def test_a_script_without_the_config_group_has_no_config_file():
    groups = [group for group in GROUPS if group is not ConfigOptions]
    with pytest.raises(UserError, match="--config_file: unknown option"):
        read("--config_file", "a.toml", groups=groups)
