"""Models in several files beside an index."""

import json

import pytest
import torch

from library.errors import UserError
from library.models.files.checkpoint import open_shards, open_weights, write_tensors

FIRST, SECOND = {"a": torch.ones(3), "b": torch.arange(2)}, {"c": torch.ones(2, 2).half()}


@pytest.fixture(params=["safetensors", "bin"])
def index(tmp_path, request):
    suffix = request.param
    names = [f"model-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for name, tensors in zip(names, (FIRST, SECOND), strict=True):
        write_tensors(tmp_path / name, tensors)
    places = dict.fromkeys(FIRST, names[0]) | dict.fromkeys(SECOND, names[1])
    path = tmp_path / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": places}))
    return path


def change(index, **places) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= places
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("opener", [open_shards, open_weights])
def test_the_files_are_read_as_one(index, opener):
    with opener(index) as file:
        assert file.shapes() == {"a": (3,), "b": (2,), "c": (2, 2)}
        assert [file.dtype(key) for key in "abc"] == [torch.float32, torch.int64, torch.float16]
        for key, tensor in (FIRST | SECOND).items():
            assert torch.equal(file.get(key), tensor)
        assert file.get("c", torch.float32).dtype == torch.float32


def test_a_missing_file(index):
    shard = next(index.parent.glob("*-00002-*"))
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard} does not exist, but {index.name} names it: download all"):
        open_shards(index)
    with pytest.raises(UserError, match=r"nowhere\.index\.json does not exist"):
        open_shards(index.with_name("nowhere.index.json"))


def test_a_tensor_that_is_not_where_the_index_says(index):
    shard = next(index.parent.glob("*-00002-*"))
    change(index, d=shard.name)
    with pytest.raises(UserError, match=rf"{shard} lacks tensors that {index.name} says it holds \(d\)"):
        open_shards(index)


def test_a_damaged_file(index):
    shard = next(index.parent.glob("*-00002-*"))
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=f"{shard} is empty"):
        open_shards(index)


@pytest.mark.parametrize("name", ["../elsewhere.bin", "/etc/elsewhere.bin", "", "..", "a\\b"])
def test_files_that_are_not_beside_the_index(index, name):
    change(index, d=name)
    with pytest.raises(UserError, match="names files that are not beside it"):
        open_shards(index)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b'{"weight_map": "a"}']
)
def test_damaged_indexes(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is"):
        open_shards(path)


def test_damage_of_any_file_is_found(tmp_path):
    names = ["1.safetensors", "2.safetensors"]
    for name, tensors in zip(names, (FIRST, SECOND), strict=True):
        ours = {"modelspec.implementation_version": "atelier/0.1.0"}  # whose hashes are relied on
        write_tensors(tmp_path / name, tensors, None, ours, content_hash=True)
    places = dict.fromkeys(FIRST, names[0]) | dict.fromkeys(SECOND, names[1])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with open_shards(index) as file:
        file.verify()
    content = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(content[:-1] + b"\0" if content[-1] else content[:-1] + b"\1")
    with open_shards(index) as file, pytest.raises(UserError, match=r"2\.safetensors is damaged"):
        file.verify()
