import errno
import hashlib
import json
import os
import struct
import sys
from contextlib import nullcontext, suppress

import pytest
import safetensors.torch
import torch

from library.errors import UserError
from library.models.files.checkpoint import LazyTensors, hash_file, hash_tensors, open_weights, write_tensors
from library.replacing import replacing
from tests.processes import python, run

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


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_tensor_that_is_cast_in_pieces_is_whole(tmp_path, suffix):
    tensor = torch.randn(701, 1009)  # 2.8 MB in no round number of pieces
    write_tensors(tmp_path / f"file{suffix}", {"weight": tensor})
    with open_weights(tmp_path / f"file{suffix}") as file:
        assert torch.equal(file.get("weight", torch.float16), tensor.half())


def test_the_content_decides_not_the_suffix(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    (tmp_path / "renamed.ckpt").write_bytes(safetensors.torch.save(tensors))
    assert torch.equal(read(tmp_path / "renamed.ckpt")["a"], tensors["a"])
    with (tmp_path / "renamed.safetensors").open("wb") as file:
        torch.save(tensors, file)
    with pytest.raises(UserError, match=r"rename it to renamed\.ckpt"):
        open_weights(tmp_path / "renamed.safetensors")


def header_of(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


OVERLAPPING = {
    "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [8], "data_offsets": [7, 15]},
}


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
        (header_of({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16), "'a' .* named 'F99'"),
        (header_of({"a": [1, 2]}), "makes no sense"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "makes no sense"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n<html>\n", "is a web page"),
        (header_of(OVERLAPPING) + bytes(16), "makes no sense"),
        (header_of({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}) + bytes(16), "makes no sense"),
        (header_of({"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}) + bytes(16), "makes no sense"),
        (header_of({"__metadata__": {"a": 1}}), "makes no sense"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "makes no sense"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_are_no_weights(tmp_path, content, message, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_a_name_that_occurs_twice(tmp_path):
    """Other programs would read the last one: which is meant nobody can tell."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    text = f'{{"a":{entry % (0, 1)},"a":{entry % (1, 2)}}}'.encode()
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"ab")
    with pytest.raises(UserError, match="makes no sense"):
        open_weights(tmp_path / "file.safetensors")


def test_holes_between_tensors(tmp_path):
    entries = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}}
    (tmp_path / "file.safetensors").write_bytes(header_of(entries) + b"...a...")
    assert read(tmp_path / "file.safetensors")["a"].tolist() == [ord("a")]


@pytest.mark.parametrize("flip", [0x01, 0x04, 0x20, 0x80, 0xFF])
def test_any_wrong_byte_in_a_header_is_a_mistake_or_nothing(tmp_path, flip):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(3), "b": torch.ones(2, 2).half(), "c": torch.ones(0, 2)}, None, {"x": "y"})
    content = path.read_bytes()
    for place in range(8 + struct.unpack("<Q", content[:8])[0]):
        wrong = bytearray(content)
        wrong[place] ^= flip
        path.write_bytes(wrong)
        with suppress(UserError):
            read(path)


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
def test_lazy_tensors_are_made_once(tmp_path, suffix):
    class Lazy(LazyTensors):
        def __init__(self):
            self.made = []

        def __iter__(self):
            return iter(["b", "a"])

        def __len__(self):
            return 2

        def __getitem__(self, name):
            self.made.append(name)
            return torch.full((2, 2), float(ord(name)))

        def outlines(self):
            return {name: torch.empty(2, 2, device="meta") for name in self}

    lazy = Lazy()
    write_tensors(tmp_path / f"file{suffix}", lazy, torch.float16, content_hash=True)
    assert sorted(lazy.made) == ["a", "b"]
    assert {name: tensor.flatten().tolist() for name, tensor in read(tmp_path / f"file{suffix}").items()} == {
        "a": [97.0] * 4,
        "b": [98.0] * 4,
    }
    hashes = hash_tensors(lazy, torch.float16)
    assert sorted(lazy.made) == ["a", "a", "b", "b"]
    assert hashes == hash_tensors(dict(lazy), torch.float16)


def test_a_lazy_tensor_unlike_its_outline_is_not_written(tmp_path):
    class Wrong(dict, LazyTensors):
        def outlines(self):
            return {"a": torch.empty(3, device="meta")}

    with pytest.raises(RuntimeError, match="a was announced as"):
        write_tensors(tmp_path / "file.safetensors", Wrong(a=torch.ones(4)))
    assert os.listdir(tmp_path) == []


OURS = {"modelspec.implementation_version": "atelier/0"}


@pytest.mark.parametrize("title", ["plain", f'"modelspec.hash_sha256":"0x{"0" * 64}"'])
def test_contents_are_verified_by_their_hash(tmp_path, title):
    path = tmp_path / "file.safetensors"
    metadata = {"a.title": title, "modelspec.hash_sha256": "of another file"} | OURS
    write_tensors(path, some_tensors(), None, metadata, content_hash=True)
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    with open_weights(path) as file:
        assert file.metadata == OURS | {
            "a.title": title,
            "modelspec.hash_sha256": f"0x{hashlib.sha256(content[start:]).hexdigest()}",
        }
        file.verify()
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with open_weights(path) as file, pytest.raises(UserError, match=r"file\.safetensors is damaged: its contents"):
        file.verify()


def test_a_network_is_verified_by_the_hash_it_is_looked_up_by(tmp_path):
    tensors = some_tensors()
    path = tmp_path / "lora.safetensors"
    for hash_, damaged in ((hash_tensors(tensors).sha256, False), ("0" * 64, True), ("unknown", False)):
        write_tensors(path, tensors, None, OURS | {"sshs_model_hash": hash_})
        with open_weights(path) as file, pytest.raises(UserError) if damaged else nullcontext():
            file.verify()


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


def test_two_processes_write_one_name(tmp_path):
    """While this one is in the middle of its file another one writes and finishes."""
    path = tmp_path / "file.safetensors"
    with replacing(path) as file:
        file.write(b"first half, ")
        file.flush()
        done = python(
            f"""
            import torch
            from library.models.files.checkpoint import write_tensors
            write_tensors({str(path)!r}, {{"a": torch.ones(3)}})
            """
        )
        assert done.returncode == 0, done.stderr
        assert read(path)["a"].tolist() == [1, 1, 1]
        file.write(b"second half")
    assert path.read_bytes() == b"first half, second half"
    assert os.listdir(tmp_path) == [path.name]


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
from library.models.files.checkpoint import write_tensors
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
    path.write_bytes(b"old")
    result = run([sys.executable, "-c", FULL_DISK, path], 60)
    assert result.stdout == f"{path} cannot be written: {os.strerror(errno.EFBIG)}\n", result.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
