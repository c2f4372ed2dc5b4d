import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from library.errors import UserError
from library.models import checkpoint
from library.models.checkpoint import hash_file, hash_tensors, open_weights, replacing, write_tensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"of.{dtype}": (torch.randn(3, 5, generator=generator) * 10).to(dtype) for dtype in DTYPES}
    tensors["transposed"] = torch.randn(4, 6, generator=generator).T
    tensors["scalar"] = torch.tensor(0.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["名前"] = torch.randn(2, generator=generator)
    return tensors


def read(path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        return {key: file.get(key) for key in file.shapes()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def content(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(content(one), content(other))


@pytest.mark.parametrize("metadata", [{}, {"note": 'a "quoted"\nline, é'}])
def test_writes_what_safetensors_would(tmp_path, metadata):
    tensors = some_tensors()
    write_tensors(tmp_path / "ours.safetensors", tensors, None, metadata)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "ours.safetensors").read_bytes() == safetensors.torch.save(contiguous, metadata or None)


def test_same_content_same_bytes(tmp_path):
    tensors, metadata = some_tensors(), {"b": "1", "a": "2", "c": "3"}
    write_tensors(tmp_path / "one.safetensors", tensors, None, metadata)
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    write_tensors(tmp_path / "two.safetensors", backwards[0], None, backwards[1])
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with open_weights(tmp_path / "one.safetensors") as file:
        assert file.metadata == metadata


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_round_trip(tmp_path, suffix):
    tensors = some_tensors()
    path = tmp_path / f"new folder/file{suffix}"
    write_tensors(path, tensors)
    back = read(path)
    assert back.keys() == tensors.keys()
    assert all(same(back[name], tensors[name]) for name in tensors)
    assert all(tensor.is_contiguous() for tensor in back.values())
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_only_floating_point_is_cast(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    write_tensors(path, {"weight": torch.tensor([1 / 3]), "count": torch.tensor([7])}, torch.float16)
    with open_weights(path) as file:
        assert (file.get("weight").dtype, file.get("count").dtype) == (torch.float16, torch.int64)
        assert file.get("weight", torch.float32).dtype == torch.float32
        assert file.get("count", torch.float32).dtype == torch.int64
        assert file.get("weight").item() == pytest.approx(1 / 3, abs=1e-3)


def test_tensors_read_from_a_pickle_are_their_own(tmp_path):
    """Otherwise changing a weight would change the mapped file's pages, and keep the whole file in memory."""
    write_tensors(tmp_path / "file.ckpt", {"weight": torch.zeros(3)})
    with open_weights(tmp_path / "file.ckpt") as file:
        file.get("weight").fill_(1)
        assert torch.equal(file.get("weight"), torch.zeros(3))


def test_a_pickled_view_leaves_its_base_behind(tmp_path):
    write_tensors(tmp_path / "file.ckpt", {"part": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "file.ckpt").stat().st_size < 10_000


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["state_dict", None])
def test_reads_older_pickles(tmp_path, zipped, wrapper):
    content = {"a.weight": torch.arange(3.0)}
    content = {wrapper: content, "global_step": 5, "epoch": 1} if wrapper else content
    torch.save(content, tmp_path / "file.ckpt", _use_new_zipfile_serialization=zipped)
    assert list(read(tmp_path / "file.ckpt")) == ["a.weight"]


def test_the_content_decides_not_the_suffix(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    (tmp_path / "renamed.ckpt").write_bytes(safetensors.torch.save(tensors))
    assert torch.equal(read(tmp_path / "renamed.ckpt")["a"], tensors["a"])
    with (tmp_path / "renamed.safetensors").open("wb") as file:
        torch.save(tensors, file)
    with pytest.raises(UserError, match=r"rename it to renamed\.ckpt"):
        open_weights(tmp_path / "renamed.safetensors")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Payload()}, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.ckpt holds more than tensors.*\.safetensors"):
        open_weights("evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(UserError, match=r"plain\.ckpt"):
        open_weights("plain.ckpt")
    assert not (tmp_path / "ran").exists()


def header_of(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just some words about a model", "is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(200, 250)), "is no model"),
        (struct.pack("<Q", 500) + b"{", "only the beginning"),
        (header_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(6), "its last 10 bytes"),
        (header_of({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}) + bytes(16), "makes no sense"),
        (header_of({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16), "makes no sense"),
        (header_of({"a": [1, 2]}), "makes no sense"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "makes no sense"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_truncated_pickle(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    (tmp_path / "part.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"part\.ckpt.*damaged or incomplete"):
        open_weights(tmp_path / "part.ckpt")


def test_pickle_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        open_weights(tmp_path / "file.pt")


def test_missing_files(tmp_path):
    (tmp_path / "sd-v1-5.safetensors").touch()
    (tmp_path / "sd-v15.safetensor").touch()
    with pytest.raises(UserError, match=r"does not exist, did you mean .*/sd-v1-5\.safetensors\?"):
        open_weights(tmp_path / "sd-v15.safetensors")
    with pytest.raises(UserError, match=r"does not exist, nor is there a folder .*nowhere"):
        open_weights(tmp_path / "nowhere/model.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        open_weights(tmp_path)


def test_hashes_are_those_of_the_file(tmp_path):
    tensors = {"a": torch.randn(500, 500), "b": torch.randn(300, 500), "c": torch.randn(7)}
    metadata = {"ss_a": "1" * 5000}
    path = tmp_path / "file.safetensors"
    write_tensors(path, tensors, torch.float16, metadata)
    hashes = hash_tensors(tensors, torch.float16, metadata)
    content = path.read_bytes()
    # the toolkit's rule: (SHA-256 after the header, SHA-256 of a short piece)
    start = struct.unpack("<Q", content[:8])[0] + 8
    assert hashes.sha256 == hashlib.sha256(content[start:]).hexdigest()

    write_tensors(path, tensors, torch.float32, metadata)
    content = path.read_bytes()
    assert len(content) > 0x110000
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert hash_tensors(tensors, torch.float32, metadata).legacy == legacy
    assert hash_file(path) == (hashlib.sha256(content).hexdigest(), legacy)


def test_legacy_hash_of_a_short_file(tmp_path):
    write_tensors(tmp_path / "file.safetensors", {"a": torch.zeros(3)})
    assert hash_tensors({"a": torch.zeros(3)}).legacy == "e3b0c442"
    assert hash_file(tmp_path / "file.safetensors").legacy == "e3b0c442"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_failed_write_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    write_tensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    meta = torch.zeros(3, device="meta")  # has a size, but no bytes to write
    with pytest.raises(NotImplementedError):
        write_tensors(path, {"a": meta})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_unwritable_places(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(tmp_path / "file/model.safetensors", {"a": torch.zeros(3)})
    with pytest.raises(UserError, match=r"model\.bmp.*ends in \.safetensors"):
        write_tensors(tmp_path / "model.bmp", {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["file"]


def test_interrupted_write_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, signal, sys, torch
from library.errors import UserError
from library.models.checkpoint import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_tensors(sys.argv[1], {"a": torch.zeros(100, 1000), "b": torch.zeros(100, 1000)})
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_full_disk_is_said(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    root = Path(checkpoint.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"{path} cannot be written: ")
    assert os.listdir(tmp_path) == []


def test_what_is_no_tensor_with_a_name_in_a_pickled_file_is_passed_over(tmp_path):
    torch.save({1: torch.ones(2), "a": torch.ones(3), "epoch": 4}, tmp_path / "a.ckpt")
    with open_weights(tmp_path / "a.ckpt") as file:
        assert list(file.keys()) == ["a"]
    torch.save({1: torch.ones(2)}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"b\.ckpt"), open_weights(tmp_path / "b.ckpt"):
        pass
