"""States on the disk: found, read, written, put away, and what is kept of numbered files."""

import json
import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.errors import UserError
from library.options.saving import SaveOptions
from library.replacing import clean_up, remove, replacing, replacing_folder
from library.training.resuming import states
from library.training.resuming.packing import pack, put, raw, unpack
from library.training.resuming.states import VERSION, find, read, sealed, tidy, unsealed, write_manifest
from library.training.retention import Series, all_series, last_saved, last_steps

DATA = Path(__file__).parent / "data"


def make(folder: Path, step: int = 1, name: str = "run", written_at: float | None = None) -> Path:
    """A state without anything that could be trained on."""
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_bytes(b"weights")
    write_manifest(folder, {"step": step}, {"output_name": name})
    if written_at is not None:
        change(folder, written_at=written_at)
    return folder


def change(folder: Path, **fields: object) -> None:
    """Another manifest, which is whole all the same."""
    manifest = folder / "state.json"
    content = unsealed(json.loads(manifest.read_text()))
    manifest.write_text(json.dumps(sealed(content | fields)))


def sentence(folder: str | Path, output_dir: Path = Path("out"), name: str = "run") -> str:
    with pytest.raises(UserError) as problem:
        find(str(folder), output_dir, name)
    return str(problem.value)


# finding


def test_a_state_is_read_from_its_manifest(tmp_path):
    state = find(str(make(tmp_path / "a", step=5)), tmp_path, "run")
    assert (state.step, state.facts, state.ours) == (5, {"output_name": "run"}, True)


def test_the_newest_state_of_this_name_is_found(tmp_path):
    make(tmp_path / "run-step00000009-state", 9, written_at=2.0)
    newest = make(tmp_path / "run-step00000003-state", 3, written_at=3.0)
    make(tmp_path / "other-state", 20, "other", written_at=4.0)
    (tmp_path / "run-step00000004-state.tmp").mkdir()
    assert find("latest", tmp_path, "run").folder == find(str(tmp_path), tmp_path, "run").folder == newest
    assert find("latest", tmp_path, "third") is None
    message = sentence(tmp_path, name="third")
    assert message == f"--resume: {tmp_path} holds states of other, run: name one of them as --output_name"


def test_the_only_name_there_is_need_not_be_given(tmp_path):
    state = make(tmp_path / "run-state")
    assert find(str(tmp_path), tmp_path, "third").folder == state


def test_what_is_no_state_is_refused(tmp_path):
    assert sentence(tmp_path).endswith("holds no training state: give a folder whose name ends in -state")
    make(tmp_path / "run-state")
    missing = tmp_path / "rum-state"
    assert sentence(missing) == f"--resume: {missing} is no folder, did you mean {tmp_path / 'run-state'}?"
    (tmp_path / "file").touch()
    assert "is no folder" in sentence(tmp_path / "file")
    change(tmp_path / "run-state", format="of another program")
    assert "holds no training state" in sentence(tmp_path / "run-state")


def test_a_folder_that_was_being_replaced_is_found(tmp_path):
    folder = make(tmp_path / "run-state")
    left = folder.rename(tmp_path / "run-state.replaced.tmp")
    for wanted in (str(folder), "latest"):
        assert find(wanted, tmp_path, "run", only_looks=True).folder == left
    assert find(str(folder), tmp_path, "run").folder == folder


# damage


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / "state.json").write_bytes(b""), "state.json is damaged: resume from another state"),
        (lambda folder: (folder / "state.json").write_text("[]"), "state.json is damaged: resume from another state"),
        (lambda folder: cut(folder / "state.json"), "state.json is damaged: resume from another state"),
        (lambda folder: flip(folder / "state.json", b'"step": 1', b'"step": 3'), "state.json is damaged"),
        (lambda folder: (folder / "trained.safetensors").unlink(), "incomplete: its trained.safetensors is missing"),
        (lambda folder: cut(folder / "trained.safetensors"), "incomplete: its trained.safetensors is missing or cut"),
        (lambda folder: change(folder, version=VERSION + 1), "was written by a newer version of this program: update"),
    ],
)
def test_a_damaged_state_is_refused_and_passed_over_for_another(tmp_path, damage, what, capsys, fresh_console):
    older = make(tmp_path / "older-state", 1, written_at=1.0)
    newer = make(tmp_path / "newer-state", 1, written_at=2.0)
    damage(newer)
    assert what in sentence(newer)
    assert find("latest", tmp_path, "run").folder == older
    assert what in capsys.readouterr().err
    shutil.rmtree(older)
    assert what in sentence("latest", tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def test_a_newer_manifest_may_be_of_any_kind(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "state.json").write_text(json.dumps({"format": "atelier training state", "version": VERSION + 1}))
    assert "was written by a newer version" in sentence(folder)


# putting away


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    gone = [
        f"run.safetensors.{os.getpid()}.tmp",
        f"run-step00000002-ema.safetensors.{os.getpid()}.tmp",
        "run-000001-state.tmp",
    ]
    stays = [
        f"other.safetensors.{os.getpid()}.tmp",
        "run.tmp.txt",
        "run-notes-state.tmp",
        f"running.{os.getppid()}.tmp",
    ]
    for name in (*gone, *stays):
        (tmp_path / name).mkdir() if "state" in name else (tmp_path / name).touch()
    (tmp_path / "run.safetensors").touch()
    tidy(tmp_path, "run")
    assert {path.name for path in tmp_path.iterdir()} == {*stays, "run.safetensors"}


def test_names_of_files_without_a_name_are_known(tmp_path):
    for name in ("epoch-000001", "at-step00000002", "last"):
        (tmp_path / f"{name}-state.tmp").mkdir()
    tidy(tmp_path, "last")
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    folder = tmp_path / "state"
    for content in ("first", "second"):
        with replacing_folder(folder) as temporary:
            (temporary / "file").write_text(content)
            assert not folder.exists() or (folder / "file").read_text() == "first"
        assert (folder / "file").read_text() == content
    with pytest.raises(KeyError), replacing_folder(folder) as temporary:  # noqa: PT012
        (temporary / "file").write_text("third")
        raise KeyError
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_folder_cannot_be_seen_while_it_is_removed(tmp_path, monkeypatch):
    folder = make(tmp_path / "run-state")
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # killed before the first file is gone
    remove(folder)
    assert not folder.exists()
    monkeypatch.undo()
    tidy(tmp_path, "run")
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_stays(tmp_path):
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
        (temporary,) = tmp_path.iterdir()
        other = temporary.rename(tmp_path / f"a.{os.getppid()}.tmp")
        clean_up(tmp_path, "a")
        assert other.exists()
        other.rename(temporary)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_which_numbered_files_are_outdated():
    numbers = [1, 2, 3, 5, 8]
    assert last_saved(2)(numbers, 8) == [1, 2, 3]
    assert last_steps(3)(numbers, 8) == [1, 2, 3]
    for keep_all in (None, 0):
        assert last_saved(keep_all)(numbers, 8) == last_steps(keep_all)(numbers, 8) == []


def test_states_can_all_stay_where_files_do_not():
    options = SaveOptions(save_last_n_epochs=1, save_last_n_epochs_state=0, save_last_n_steps=1)
    series = all_series(options)
    outdated = {name: each.outdated([1, 2, 3, 4], 4) for name, each in series.items()}
    assert outdated == {"epochs": [1, 2, 3], "steps": [1, 2], "states of epochs": [], "states of steps": [1, 2]}


def test_a_number_that_is_written_again_is_the_newest():
    series = Series(last_saved(2))
    for number in (1, 2, 1):
        series.add(number, [str(number)])
    assert list(series.written) == [2, 1]


# packing


def test_packed_values_come_back_as_they_were():
    tensors: dict[str, torch.Tensor] = {}
    value = {
        "state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, 1: {}},
        "groups": OrderedDict(lr=1e-30, name=None, on=True, list=[1, "a", [2.5]]),
        "nan": float("inf"),
        "half": torch.tensor([0.1, -0.0], dtype=torch.bfloat16),
        "numpy": [np.float32(0.1), np.float64(0.1), np.int64(3)],
    }
    packed = json.loads(json.dumps(pack(value, tensors, "optimizer")))
    assert set(tensors) == {"optimizer.state.0.step", "optimizer.half"}
    back = unpack(packed, tensors)
    assert torch.equal(back["half"].view(torch.int16), value["half"].view(torch.int16))
    for content in (back, value):
        content.pop("half")
    assert back == value
    assert isinstance(back["state"][0]["betas"], tuple)
    assert list(map(type, back["numpy"])) == [np.float32, np.float64, np.int64]
    with pytest.raises(TypeError, match=r"optimizer\.what holds a object"):
        pack({"what": object()}, {}, "optimizer")


class Branch(nn.Module):
    def __init__(self, size: int = 2, alpha: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(size, 2)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("count", torch.tensor(0))


def test_what_a_module_makes_anew_is_in_no_state_and_no_matter_in_one():
    branch = nn.ModuleDict({"a": Branch()})
    names = set(raw(branch))
    branch["a"].register_buffer("positions", torch.arange(3), persistent=False)
    assert set(raw(branch)) == names
    put(branch, {**raw(branch), "a.positions": torch.arange(5)})


def test_weights_and_buffers_are_put_in_place():
    one, other = Branch(), Branch()
    one.count += 5
    put(other, raw(one))
    assert all(torch.equal(tensor, raw(one)[name]) for name, tensor in raw(other).items())
    assert other.count == 5


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Branch(3), r"linear\.weight is \[2, 3\] there"),
        (Branch(alpha=2.0), "alpha is 2 there and 1 here"),
        (nn.Linear(2, 2), r"alpha is missing"),
        (nn.ModuleDict({"linear": Branch()}), "is missing"),
    ],
)
def test_weights_of_something_else_are_not(other, what):
    with pytest.raises(ValueError, match=what):
        put(Branch(), raw(other))


# for ever


def test_a_state_of_version_1_is_understood(tmp_path, train, flags, monkeypatch, capsys, fresh_console):
    with zipfile.ZipFile(DATA / "state_1.zip") as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.glob("*-state")
    assert read(folder).step == 2
    train(flags(tmp_path / "out", **OLD, max_train_steps=4, save_state=True, resume=folder))
    message = capsys.readouterr().err
    assert "going on after step 2" in message
    assert "anew" not in message
    assert "learning rate" not in message
    assert json.loads((tmp_path / "out/run-state/objects.json").read_text())["objects"].keys() == {
        "optimizer", "scheduler", "method", "timesteps", "tracker", "saver", "validation", "provenance", "ema",
    }  # fmt: skip


OLD = {
    "network_dim": 1,
    "network_train_text_encoder_only": True,
    "ema": True,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3,
    "save_every_n_steps": 1,
    "save_last_n_steps": 5,
    "validation_split": 0.2,
    "validate_every_n_steps": 1,
}


def test_each_file_of_a_state_is_checked(tmp_path, train, flags, capsys):
    train(flags(tmp_path / "out", **OLD, max_train_steps=2, save_state=True))
    for name, sign in (
        (states.TRAINED, "is damaged: its contents do not have the hash"),
        (states.TENSORS, "is damaged: its contents do not have the hash"),
        (states.OBJECTS, "is damaged: resume from another state"),
    ):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "out" / "run-state", folder)
        content = bytearray((folder / name).read_bytes())
        place = content.rindex(b"0.01") + 3 if name == states.OBJECTS else len(content) - 2
        content[place] ^= 1
        (folder / name).write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            train(flags(tmp_path / "out", **OLD, max_train_steps=3, resume=folder))
        (message,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert f"{name} {sign}" in message
