"""One reader and one writer for files of tensors: .safetensors, and PyTorch's .ckpt/.pt read without executing code."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import UserError, suggest_path
from library.models.files.pickled_file import PickledFile, write_pickled
from library.models.files.safetensors_file import SafetensorsFile, lay_out, stream, write_safetensors
from library.models.files.sharded_file import INDEX_SUFFIX, ShardedFile
from library.models.files.weights_file import LazyTensors, WeightsFile, is_finite
from library.replacing import replacing
from library.suffixes import SAFETENSORS_SUFFIX, WEIGHTS_SUFFIXES

__all__ = [
    "Hashes",
    "LazyTensors",
    "WeightsFile",
    "hash_file",
    "hash_tensors",
    "is_finite",
    "open_shards",
    "open_weights",
    "stores_metadata",
    "write_tensors",
    "writing_order",
]

_LEGACY_HASH_START, _LEGACY_HASH_BYTES = 0x100000, 0x10000


def open_weights(path: str | os.PathLike) -> WeightsFile:
    """Open a file of tensors, whatever its suffix says; an index (`*.index.json`) opens the files it names.

    UserError if it is missing or is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the .safetensors or .ckpt file of the model itself")
    if path.name.endswith(INDEX_SUFFIX):
        return open_shards(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist{suggest_path(path, WEIGHTS_SUFFIXES)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if start[8:] == b"{" or not start.startswith((b"PK\x03\x04", b"\x80")):
        return SafetensorsFile(path)
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        raise UserError(f"{path} is a PyTorch file under a wrong name: rename it to {path.with_suffix('.ckpt').name}")
    return PickledFile(path)


def open_shards(index_json: str | os.PathLike) -> WeightsFile:
    """Open the files beside a `*.safetensors.index.json` or `*.bin.index.json` as one.

    UserError if one of them is missing or damaged, or holds not what the index says.
    """
    return ShardedFile(Path(index_json), open_weights)


class Hashes(NamedTuple):
    """Names of a file that other programs look it up by: SHA-256 in full, and the first 8 digits of a short one."""

    sha256: str
    legacy: str


def hash_tensors(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> Hashes:
    """Hashes of the safetensors file that `write_tensors` would write, which is not written: `sha256` of everything
    after its header, `legacy` of the 0x10000 bytes from offset 0x100000. Makes each lazy tensor once.
    """
    order, header = lay_out(tensors, dtype, metadata or {})
    whole, window, position = hashlib.sha256(), hashlib.sha256(), len(header)
    window.update(header[_LEGACY_HASH_START : _LEGACY_HASH_START + _LEGACY_HASH_BYTES])

    def take(data: memoryview) -> None:
        nonlocal position
        whole.update(data)
        first, last = _LEGACY_HASH_START - position, _LEGACY_HASH_START + _LEGACY_HASH_BYTES - position
        window.update(data[max(first, 0) : max(last, 0)])
        position += len(data)

    stream(tensors, dtype, order, take)
    return Hashes(whole.hexdigest(), window.hexdigest()[:8])


def hash_file(path: str | os.PathLike) -> Hashes:
    """Hashes of a file as it lies on the disk: `sha256` of all of it, `legacy` of its 0x10000 bytes from 0x100000."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(_LEGACY_HASH_START)
        legacy = hashlib.sha256(file.read(_LEGACY_HASH_BYTES)).hexdigest()[:8]
        file.seek(0)
        while data := file.read(1 << 20):
            whole.update(data)
    return Hashes(whole.hexdigest(), legacy)


def stores_metadata(path: str | os.PathLike) -> bool:
    """Whether a file of this name keeps metadata, which only .safetensors does."""
    return Path(path).suffix.lower() == SAFETENSORS_SUFFIX


def writing_order(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> list[str]:
    """The order in which `write_tensors`, without another number format, asks for the tensors of this file."""
    return lay_out(tensors, None, {}).order if stores_metadata(path) else sorted(tensors)


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    content_hash: bool = False,
    beside: Mapping[str, int] | None = None,
) -> None:
    """Write tensors to `path`, in the format its suffix names: .safetensors, or .ckpt/.pt (which keeps no metadata).

    Floating-point tensors are stored as `dtype` if one is given. The same content gives the same bytes. One tensor at
    a time is made or copied, each once. With `content_hash` the metadata get `modelspec.hash_sha256`, by which
    `WeightsFile.verify` knows damage. `beside` are numbers that a .ckpt gets besides its tensors, which are its
    `state_dict` then, as in whole models. UserError if the place cannot be written or the suffix is unknown.
    """
    if Path(path).suffix.lower() not in WEIGHTS_SUFFIXES:
        raise UserError(f"{path}: the name of a weights file ends in .safetensors or .ckpt")
    with replacing(path) as file:
        if stores_metadata(path):
            write_safetensors(file, tensors, dtype, metadata or {}, content_hash)
        else:
            write_pickled(file, tensors, dtype, beside)
