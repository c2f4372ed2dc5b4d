"""--deterministic: the same command writes the same files, or says what stands in the way."""

import os
import re
from pathlib import Path

import pytest
import torch

from library.training.step import TrainingStep

# All that may differ between the files of two runs of one command line.
OF_THE_OCCASION = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


@pytest.fixture(autouse=True)
def torch_as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "as before")
    yield
    torch.use_deterministic_algorithms(False)


def timeless(path: Path) -> tuple[str, bytes]:
    """The header of a .safetensors file without what is of the occasion, which it has to have, and all after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].decode().rstrip()  # it is filled up to a multiple of eight
    for key in OF_THE_OCCASION:
        header, found = re.subn(rf'"{re.escape(key)}": ?"[^"]*"', key, header)
        assert found == 1
    return header, data[end:]


def test_the_same_command_writes_the_same_files(flags, train, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train(flags("out", deterministic=True, save_every_n_steps=2, ema=True, network_dropout=0.1, seed=3))
    files = sorted(path.name for path in (tmp_path / "one" / "out").iterdir())
    assert len(files) == 6
    assert files == sorted(path.name for path in (tmp_path / "two" / "out").iterdir())
    for name in files:
        one, two = (timeless(tmp_path / folder / "out" / name) for folder in ("one", "two"))
        assert one == two, name


def test_an_operation_that_cannot_repeat_itself_is_named(flags, train, tmp_path, monkeypatch, capsys):
    losses = TrainingStep.losses

    def wavering(self, batch, *others):
        torch.nn.functional.max_unpool2d(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 2)
        return losses(self, batch, *others)

    monkeypatch.setattr(TrainingStep, "losses", wavering)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, deterministic=True))
    assert "max_unpooling2d_forward_out cannot be computed so that it repeats itself" in capsys.readouterr().err
    train(flags(tmp_path))
    assert (tmp_path / "run.safetensors").exists()


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_cublas_is_told_before_it_starts(before, after, flags, train, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if before:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    train(flags(tmp_path, deterministic=True, dry_run=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
