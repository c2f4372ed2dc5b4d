"""tools/cache_text_encoder_outputs.py: files made ahead, by several processes, and after a kill."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from library import cli
from library.data.caching import text_cache
from library.models.registry import load_model
from library.models.text import TextOptions
from tests.pictures import picture
from tools import cache_text_encoder_outputs

SCRIPT = "tools/cache_text_encoder_outputs.py"
SUFFIX = "_sd_te_outputs.npz"


@pytest.fixture
def tool(monkeypatch, fresh_console) -> Iterator[Callable[[Sequence[str]], None]]:
    """The script in this process, on the CPU."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def run(words: Sequence[str]) -> None:
        forget()
        monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
        cli.run(cache_text_encoder_outputs.main)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield run
    forget()


def folder_of(tmp_path: Path, captions: Sequence[str]) -> Path:
    """A folder of small pictures with these captions."""
    for number, caption in enumerate(captions):
        picture(tmp_path / "data" / "1_thing" / f"{number:03}.png", (8, 8), caption)
    return tmp_path / "data" / "1_thing"


def words(model_file: Path, folder: Path, *more: str) -> list[str]:
    data = ["--train_data_dir", str(folder.parent), "--resolution", "32"]
    return ["--pretrained_model_name_or_path", str(model_file), *data, *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*{SUFFIX}"))}


COLOURS = ["red", "blue", "red", "green"]


def test_the_files_hold_what_the_models_text_encoder_says(tmp_path, model_file, tool, capsys):
    folder = folder_of(tmp_path, COLOURS)
    tool(words(model_file, folder, "--text_encoder_batch_size", "2", "--caption_prefix", "a photo,"))
    assert capsys.readouterr().out == "text encoder outputs, on cpu: 4 files written, 0 valid already, 0 failed\n"
    model = load_model(model_file)
    for number, colour in enumerate(COLOURS):
        with torch.no_grad():
            expected = model.encode_text([f"a photo, {colour}"])["hidden_state1"][0]
        with np.load(folder / f"{number:03}{SUFFIX}") as file:
            assert np.allclose(file["hidden_state1"], expected.numpy(), atol=1e-6)
    before = files(folder)
    tool(words(model_file, folder, "--caption_prefix", "a photo,"))
    assert capsys.readouterr().out == "text encoder outputs, on cpu: 0 files written, 4 valid already, 0 failed\n"
    assert files(folder) == before


@pytest.mark.parametrize(
    ("family", "extra", "suffix"),
    [
        ("sd2", ["--v2"], "_sd2_te_outputs.npz"),
        ("sdxl", [], "_te_outputs.npz"),
        ("sdxl", ["--sdxl"], "_te_outputs.npz"),
    ],
)
def test_every_familys_files_have_its_encoders_outputs(tmp_path, model_files, tool, family, extra, suffix):
    folder = folder_of(tmp_path, COLOURS)
    tool(words(model_files(family), folder, "--max_token_length", "150", *extra))
    model = load_model(model_files(family))
    model.read_captions(TextOptions(150))
    assert {path.name for path in folder.glob("*.npz")} == {f"{number:03}{suffix}" for number in range(len(COLOURS))}
    for number, colour in enumerate(COLOURS):
        with torch.no_grad():
            expected = model.encode_text([colour])
        with np.load(folder / f"{number:03}{suffix}") as file:
            for name, tensor in expected.items():
                assert np.allclose(file[name], tensor[0].numpy(), atol=1e-5)


def test_the_model_is_not_loaded_when_all_files_are_there(tmp_path, model_file, tool, monkeypatch):
    folder = folder_of(tmp_path, COLOURS)
    tool(words(model_file, folder))
    monkeypatch.delattr("library.models.registry.ModelInfo.load")
    tool(words(model_file, folder))


def test_another_text_encoder_is_noticed_and_another_unet_is_not(tmp_path, model_file, tool, capsys):
    folder = folder_of(tmp_path, COLOURS)
    tool(words(model_file, folder))
    model = load_model(model_file)
    with torch.no_grad():
        model.unet.conv_in.bias += 1
    model.save(tmp_path / "unet.safetensors")
    tool(words(tmp_path / "unet.safetensors", folder))
    assert "0 files written, 4 valid already" in capsys.readouterr().out
    with torch.no_grad():
        model.text_encoders[0].model.final_layer_norm.bias += 1
    model.save(tmp_path / "text.safetensors")
    tool(words(tmp_path / "text.safetensors", folder))
    printed = capsys.readouterr()
    assert "4 files written, 0 valid already" in printed.out
    assert "replaced: 4 made from another caption or other text encoders" in printed.err


@pytest.mark.parametrize("flag", ["--skip_existing", "--skip_cache_check"])
def test_existing_files_are_trusted_on_request(tmp_path, model_file, tool, flag):
    folder = folder_of(tmp_path, COLOURS)
    (folder / f"001{SUFFIX}").write_bytes(b"anything")
    tool(words(model_file, folder, flag))
    assert files(folder)[f"001{SUFFIX}"] == b"anything"
    tool(words(model_file, folder))
    assert files(folder)[f"001{SUFFIX}"] != b"anything"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shuffle_caption"], "shuffle_caption"),
        (["--enable_wildcard"], "enable_wildcard"),
        (["--flux"], "--flux: FLUX models are not supported"),
        (["--skip_exsting"], "did you mean --skip_existing"),
        (["--pretrained_model_name_or_path", "no.safetensors"], "no.safetensors does not exist"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, model_file, tool, capsys, more, message):
    folder = folder_of(tmp_path, COLOURS)
    with pytest.raises(SystemExit) as stop:
        tool(words(model_file, folder, *more))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not files(folder)


def test_a_folder_that_cannot_be_written_to_fails_with_a_remedy(tmp_path, model_file, tool, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(text_cache.tempfile, "TemporaryFile", read_only)
    folder = folder_of(tmp_path, COLOURS)
    with pytest.raises(SystemExit) as stop:
        tool(words(model_file, folder))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "0 files written, 0 valid already, 4 failed" in printed.out
    assert f"{folder} cannot be written to: change that, or train with --cache_text_encoder_outputs" in printed.err


def test_after_a_kill_it_goes_on_to_the_same_files(tmp_path, model_file, tool, fork_server, capsys):
    captions = [f"number {number}" for number in range(20)]
    folder = folder_of(tmp_path / "killed", captions)
    script = "tools.cache_text_encoder_outputs"
    ended = fork_server.run(words(model_file, folder, "--text_encoder_batch_size", "4"), script, at=100)
    assert ended.status == -signal.SIGKILL, ended.said
    assert 5 <= len(files(folder)) < len(captions)
    tool(words(model_file, folder, "--text_encoder_batch_size", "4"))
    untouched = folder_of(tmp_path / "untouched", captions)
    tool(words(model_file, untouched, "--text_encoder_batch_size", "4"))
    assert files(folder) == files(untouched)
    assert len(files(folder)) == len(captions)
    assert not list(folder.glob("*.tmp"))


def test_two_processes_share_the_work_and_add_up_what_they_did(tmp_path, model_file, tool, fork_server):
    captions = [f"number {number % 5}" for number in range(8)]
    folder = folder_of(tmp_path / "two", captions)
    ended = fork_server.run(words(model_file, folder), "tools.cache_text_encoder_outputs", processes=2)
    assert ended.status == 0, ended.said
    assert ended.said.count("text encoder outputs, on cpu: 8 files written, 0 valid already, 0 failed\n") == 1
    alone = folder_of(tmp_path / "one", captions)
    tool(words(model_file, alone))
    assert files(folder) == files(alone)
