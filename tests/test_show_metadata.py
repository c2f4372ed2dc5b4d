"""tools/show_metadata.py: what people and programs read from it."""

import json
import struct
import sys

import pytest
import torch

from library import cli
from library.models.files.checkpoint import write_tensors
from tests.processes import run
from tools import show_metadata

SCRIPT = "tools/show_metadata.py"
TENSORS = {"weight": torch.ones(2)}


@pytest.fixture
def show(monkeypatch, fresh_console, capsys):
    """`show(words)` -> (stdout, stderr) of the script in this process."""

    def call(*words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(show_metadata.main)
        return capsys.readouterr()

    return call


@pytest.fixture
def mistake(show, capsys):
    def call(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            show(*words)
        assert end.value.code == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert said.out == ""
        return line

    return call


def test_nested_values_are_decoded_and_names_sorted(show, tmp_path):
    metadata = {
        "ss_tag_frequency": json.dumps({"1_sks": {"犬": 3, "cat": 1}}),
        "ss_learning_rate": "1e-4",
        "ss_seed": "1",
        "ss_v2": "true",
        "modelspec.title": 'a "title"\nof two lines',
        "ss_datasets": "[1, 2",
        "deep": "[" * 100_000,
    }
    write_tensors(tmp_path / "lora.safetensors", TENSORS, None, metadata)
    out, err = show("--model", tmp_path / "lora.safetensors")
    found = json.loads(out)
    assert found == metadata | {"ss_tag_frequency": {"1_sks": {"犬": 3, "cat": 1}}}
    assert list(found) == sorted(metadata)
    assert list(found["ss_tag_frequency"]["1_sks"]) == ["cat", "犬"]
    assert "犬" in out
    assert err == ""


def test_of_a_picture_its_kind_and_size_are_shown(show, tmp_path):
    metadata = {"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 100_000, "short": "data:,red"}
    write_tensors(tmp_path / "lora.safetensors", TENSORS, None, metadata)
    found = json.loads(show(tmp_path / "lora.safetensors")[0])
    assert found == metadata | {"modelspec.thumbnail": "data:image/jpeg;base64,... (100023 characters)"}


def test_the_name_alone_in_a_program_of_its_own(tmp_path):
    file = tmp_path / "a model.safetensors"
    write_tensors(file, TENSORS, None, {"note": "犬"})
    done = run([sys.executable, SCRIPT, file], 60, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"note": "犬"}


def test_says_where_there_is_none(show, tmp_path):
    for name in ("bare.safetensors", "model.ckpt"):
        write_tensors(tmp_path / name, TENSORS)
    assert show(tmp_path / "bare.safetensors") == ("", f"{tmp_path / 'bare.safetensors'} holds no metadata\n")
    sentence = f"{tmp_path / 'model.ckpt'} holds no metadata: PyTorch files never do\n"
    assert show("--model", tmp_path / "model.ckpt") == ("", sentence)


def test_mistakes(mistake, tmp_path):
    good = tmp_path / "good.safetensors"
    write_tensors(good, TENSORS, None, {"note": "x"})
    assert "--model: no file is given" in mistake()
    assert f"does not exist, did you mean {good}?" in mistake(tmp_path / "god.safetensors")
    assert "is a folder" in mistake(tmp_path)
    for size, reason in ((0, "is empty"), (30, "only the beginning"), (good.stat().st_size - 1, "is incomplete")):
        (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:size])
        assert reason in mistake(tmp_path / "cut.safetensors")
    header = json.dumps({"__metadata__": ["no", "mapping"]}).encode()
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "its header makes no sense" in mistake(tmp_path / "odd.safetensors")
