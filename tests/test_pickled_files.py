"""PyTorch's own files of tensors: what they say to PyTorch, what they may hold, and the memory they take."""

import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.models.files import pickled_file
from library.models.files.checkpoint import open_weights, write_tensors
from tests.processes import python
from tests.test_checkpoint import read, same, some_tensors

# Writing


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pytorch_reads_what_is_written(tmp_path, mapped, dtype):
    tensors = some_tensors() | {name: torch.arange(3).to(getattr(torch, name)) for name in ("uint16", "complex64")}
    write_tensors(tmp_path / "file.ckpt", tensors, dtype)
    back = torch.load(tmp_path / "file.ckpt", weights_only=True, mmap=mapped)
    assert type(back) is dict
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(back[name], tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor), name
        assert back[name].is_contiguous()


def test_the_archive_is_a_sound_one_of_known_records(tmp_path):
    """Web UIs look at the names of the records before they open a file, and refuse others."""
    write_tensors(tmp_path / "file.ckpt", {"b": torch.zeros(30), "a": torch.ones(70).half(), "none": torch.ones(0)})
    with zipfile.ZipFile(tmp_path / "file.ckpt") as archive:
        assert archive.testzip() is None
        records = archive.infolist()
    names = [record.filename for record in records]
    assert names == [f"archive/{name}" for name in ("data.pkl", "byteorder", "data/0", "data/1", "data/2", "version")]
    content = (tmp_path / "file.ckpt").read_bytes()
    assert content.index(torch.ones(70).half().numpy().tobytes()) % 64 == 0


def test_same_content_same_bytes(tmp_path):
    """Also where a tensor is named like a word of the format, be it the same string object or an equal one."""
    words = ["cpu", "0", "a.long.name", "storage"]
    write_tensors(tmp_path / "one.ckpt", {word: torch.full((3,), float(len(word))) for word in words})
    equal = [word.encode().decode() for word in reversed(words)]
    write_tensors(tmp_path / "two.ckpt", {word: torch.full((3,), float(len(word))) for word in equal})
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "two.ckpt").read_bytes()
    assert read(tmp_path / "one.ckpt")["cpu"].tolist() == [3, 3, 3]


def test_whole_models_have_numbers_beside_their_weights(tmp_path):
    path = tmp_path / "file.ckpt"
    write_tensors(path, {"a": torch.ones(3)}, beside={"global_step": 70_000, "epoch": 3})
    content = torch.load(path, weights_only=True)
    assert torch.equal(content.pop("state_dict")["a"], torch.ones(3))
    assert content == {"epoch": 3, "global_step": 70_000}
    write_tensors(path, {"a": torch.ones(3)}, beside={})
    assert list(torch.load(path, weights_only=True)) == ["state_dict"]
    assert list(read(path)) == ["a"]


def test_a_view_leaves_its_base_behind(tmp_path):
    write_tensors(tmp_path / "file.ckpt", {"part": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "file.ckpt").stat().st_size < 10_000


# Reading


def test_tensors_are_their_own(tmp_path):
    """Otherwise changing a weight would change the mapped file's pages, and keep the whole file in memory."""
    write_tensors(tmp_path / "file.ckpt", {"weight": torch.zeros(3)})
    with open_weights(tmp_path / "file.ckpt") as file:
        file.get("weight").fill_(1)
        assert torch.equal(file.get("weight"), torch.zeros(3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrappers", [[], ["state_dict"], ["state_dict", "state_dict"]])
def test_what_other_programs_wrap_tensors_in(tmp_path, zipped, wrappers):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    content = {"a.weight": parameter, "model_ema.aweight": torch.ones(3)}
    for wrapper in wrappers:
        content = {wrapper: content, "global_step": 5, "epoch": 1}
    torch.save(content, tmp_path / "file.ckpt", _use_new_zipfile_serialization=zipped)
    back = read(tmp_path / "file.ckpt")
    assert list(back) == ["a.weight", "model_ema.aweight"]
    assert type(back["a.weight"]) is torch.Tensor
    assert not back["a.weight"].requires_grad
    assert torch.equal(back["a.weight"], parameter)


def test_what_is_no_tensor_with_a_name_is_passed_over(tmp_path):
    torch.save({1: torch.ones(2), "a": torch.ones(3), "epoch": 4}, tmp_path / "a.ckpt")
    with open_weights(tmp_path / "a.ckpt") as file:
        assert list(file.keys()) == ["a"]
    torch.save({1: torch.ones(2)}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"b\.ckpt"), open_weights(tmp_path / "b.ckpt"):
        pass


def test_what_training_leaves_in_checkpoints_is_passed_over(tmp_path, monkeypatch):
    """As in the checkpoints of Stable Diffusion 1.5: classes of packages that are not even installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    content = {
        "state_dict": {"a": torch.ones(3)},
        "callbacks": {module.ModelCheckpoint: {"best_model_score": np.float64(0.5)}},
        "saved": module.ModelCheckpoint(),
    }
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(content, tmp_path / "file.ckpt")
    assert list(read(tmp_path / "file.ckpt")) == ["a"]


@pytest.mark.parametrize("order", ["big", "little"])
def test_files_of_the_other_byte_order(tmp_path, order):
    """Tensors share pages of the file: read twice, and after a neighbour, they must be the same."""
    numbers = [1.0, 2.0, 3.0]
    torch.save({name: torch.tensor(numbers) for name in "ab"}, tmp_path / "native.ckpt")
    changed = zipfile.ZipFile(tmp_path / "file.ckpt", "w")
    with zipfile.ZipFile(tmp_path / "native.ckpt") as native, changed:
        for record in native.infolist():
            data = native.read(record)
            if record.filename.endswith("/byteorder"):
                data = order.encode()
            elif "/data/" in record.filename and order != sys.byteorder:
                data = np.frombuffer(data, np.float32).byteswap().tobytes()
            changed.writestr(record.filename, data)
    with open_weights(tmp_path / "file.ckpt") as file:
        assert [file.get(name).tolist() for name in "abab"] == [numbers] * 4


class Listed:
    """Pickled as a tensor whose numbers are in the pickle itself."""

    def __reduce__(self):
        return (torch.Tensor, ([1.0] * 50_000,))


def test_reading_leaves_memory_alone_that_is_not_the_file(tmp_path):
    torch.save({"listed": Listed(), "a": torch.ones(50_000)}, tmp_path / "file.ckpt")
    with open_weights(tmp_path / "file.ckpt") as file:
        for name in ("listed", "a", "listed", "a"):
            assert torch.equal(file.get(name), torch.ones(50_000)), name


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told in the unit of Linux")
def test_memory_stays_near_one_tensor(tmp_path):
    """128 MiB in tensors of 4 MiB are written and read in much less than that."""
    done = python(
        f"""
        import resource
        import torch
        from library.models.files.checkpoint import LazyTensors, open_weights, write_tensors

        class Made(LazyTensors):
            def __iter__(self):
                return map(str, range(32))
            def __len__(self):
                return 32
            def __getitem__(self, name):
                return torch.full((1024, 1024), float(name))
            def outlines(self):
                return {{name: torch.empty(1024, 1024, device="meta") for name in self}}

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        path = {str(tmp_path / "file.ckpt")!r}
        write_tensors(path, {{"a": torch.ones(3)}})
        before = peak()
        write_tensors(path, Made(), beside={{"epoch": 1}})
        with open_weights(path) as file:
            for name in file.keys():
                assert file.get(name)[-1, -1] == float(name)
        print(peak() - before)
        """,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 * 1024  # KiB


# What is refused


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


class Command:
    """PyTorch has a sentence of its own about this one."""

    def __reduce__(self):
        return (os.system, ("echo > ran",))


@pytest.mark.parametrize("payload", [Payload, Command])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, zipped, payload):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": payload()}, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.ckpt holds more than tensors.*\.safetensors"):
        open_weights("evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(payload(), protocol=2))
    with pytest.raises(UserError, match=r"plain\.ckpt"):
        open_weights("plain.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.load("evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload is one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_anything_is_not_called_damaged(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    Path("plain.ckpt").write_bytes(pickle.dumps({"a": Command()}, protocol))
    with pytest.raises(UserError) as error:
        open_weights("plain.ckpt")
    assert "copy it again" not in str(error.value)
    assert ("could run code" in str(error.value)) == (protocol >= 2)  # older ones do not begin as anything
    Path("plain.ckpt").write_bytes(pickle.dumps([1, 2], protocol))
    with pytest.raises(UserError, match=r"is (a text file|no model|a pickle but no PyTorch weights file)"):
        open_weights("plain.ckpt")
    assert not Path("ran").exists()


def test_an_incomplete_file_of_old_is_called_so(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "part.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged or incomplete: copy it again"):
        open_weights(tmp_path / "part.ckpt")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_pickles_is_refused(tmp_path, monkeypatch, mode):
    """The oldest format of PyTorch, which needs code that is not restricted."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("evil.pt", mode) as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(UserError, match=r"evil\.pt is (no model|a text file)"):
        open_weights("evil.pt")
    assert not (tmp_path / "ran").exists()


def test_truncated(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    (tmp_path / "part.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"part\.ckpt.*damaged or incomplete"):
        open_weights(tmp_path / "part.ckpt")


def test_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        open_weights(tmp_path / "file.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_any_wrong_byte_is_a_mistake_or_nothing(tmp_path, zipped):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.ones(2), "b": torch.ones(1).half()}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for place in range(len(content)):
        wrong = bytearray(content)
        wrong[place] ^= 0x41
        path.write_bytes(wrong)
        with suppress(UserError):
            read(path)


def test_without_a_way_to_give_pages_back(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(pickled_file, "_madvise", None)
    write_tensors(tmp_path / "file.ckpt", some_tensors())
    assert read(tmp_path / "file.ckpt").keys() == some_tensors().keys()


def test_a_flipped_bit_among_the_weights_is_found(tmp_path):
    path = tmp_path / "file.ckpt"
    write_tensors(path, {"weight": torch.ones(1000)})
    with open_weights(path) as file:
        file.verify()
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 50] ^= 1
    path.write_bytes(content)
    with open_weights(path) as file, pytest.raises(UserError, match=r"file\.ckpt is damaged: its contents"):
        file.verify()
