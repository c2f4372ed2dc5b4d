"""One reader and one writer for files of tensors: .safetensors, and PyTorch's .ckpt/.pt read without executing code.

The safetensors format (github.com/huggingface/safetensors) is read and written by hand: its library maps files into
memory, and a cast on top of that needs up to three times the bytes of the result, and it orders metadata at random.
"""

import hashlib
import json
import math
import os
import pickle
import struct
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from library.errors import UserError, suggest_path

# In safetensors' own order, which decides the order of the tensors in a file: later ones come first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPE_RANK = {name: rank for rank, name in enumerate(_DTYPES)}
SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
_LARGEST_HEADER = 100_000_000  # the format's own limit
_LEGACY_HASH_START, _LEGACY_HASH_BYTES = 0x100000, 0x10000


class WeightsFile(AbstractContextManager["WeightsFile"]):
    """An open file of named tensors; a context manager. Nothing but the header is read until `get`."""

    path: Path
    metadata: dict[str, str]

    @abstractmethod
    def keys(self) -> list[str]:
        """The tensors' names."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]: ...

    @abstractmethod
    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, on the CPU; floating-point ones in `dtype` if given."""

    @abstractmethod
    def close(self) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All names with their shapes."""
        names = self.keys()
        return {key: self.shape(key) for key in names}

    def __exit__(self, *exception: object) -> None:
        self.close()


class _SafetensorsFile(WeightsFile):
    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        start = self._file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        self._data_start = 8 + length
        if not 2 <= length <= _LARGEST_HEADER or self._data_start > size:
            raise UserError(f"{self.path} {_what_it_is(start)}")
        try:
            header = json.loads(self._file.read(length))
            self.metadata = header.pop("__metadata__", {})
            if not isinstance(self.metadata, dict):
                raise ValueError("the metadata is no mapping")
            self._entries = {
                key: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), *map(int, entry["data_offsets"]))
                for key, entry in header.items()
            }
            for dtype, shape, start, end in self._entries.values():
                if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
                    raise ValueError("a tensor's place does not fit its shape")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged: its header makes no sense, copy the file again") from error
        end = max((entry[3] for entry in self._entries.values()), default=0)
        if self._data_start + end > size:
            missing = self._data_start + end - size
            raise UserError(f"{self.path} is incomplete: its last {missing:,} bytes are missing, copy it again")

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key][1]

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        stored, shape, start, _ = self._entries[key]
        tensor = torch.empty(shape, dtype=stored)
        self._file.seek(self._data_start + start)
        view = _bytes_of(tensor)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise UserError(f"{self.path} ended while {key} was being read")
            view = view[count:]
        return _cast(tensor, dtype)

    def close(self) -> None:
        self._file.close()


class _PickledFile(WeightsFile):
    def __init__(self, path: Path, zipped: bool):
        self.path = path
        self.metadata = {}
        try:
            # only the newer, zipped format can be mapped; tensors then come off the disk when they are asked for
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} holds more than tensors, which could run code when it is opened, so it is not read: "
                "convert it to .safetensors where you trust it, or use a .safetensors copy of the model"
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise UserError(f"{path} is no PyTorch weights file, or is damaged or incomplete: copy it again") from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        entries = content.items() if isinstance(content, dict) else ()
        self._tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
        if not self._tensors:
            raise UserError(f"{path} holds no named tensors, so it is not a model")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        stored = self._tensors[key]
        tensor = _cast(stored, dtype)
        return tensor.clone(memory_format=torch.contiguous_format) if tensor is stored else tensor.contiguous()

    def close(self) -> None:
        self._tensors = {}


def open_weights(path: str | os.PathLike) -> WeightsFile:
    """Open a file of tensors, whatever its suffix says. UserError if it is missing or is no such file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the .safetensors or .ckpt file of the model itself")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist{suggest_path(path, _SUFFIXES)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    zipped = start.startswith(b"PK\x03\x04")
    if start[8:] == b"{" or not (zipped or start.startswith(b"\x80")):
        return _SafetensorsFile(path)
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        raise UserError(f"{path} is a PyTorch file under a wrong name: rename it to {path.with_suffix('.ckpt').name}")
    return _PickledFile(path, zipped)


def _what_it_is(start: bytes) -> str:
    """The end of a sentence about a file that begins with `start` and is no file of tensors."""
    if not start:
        return "is empty, copy it again"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the model: fetch the real file with `git lfs pull`"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "is a text file, not a model: give a .safetensors or .ckpt file"
    return "is no model, or only the beginning of one: give a complete .safetensors or .ckpt file"


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _of_its_own(tensor: Tensor) -> Tensor:
    """The tensor apart from any larger one that it is a view of, which would be pickled along with it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Layout(NamedTuple):
    """Where a safetensors file puts its tensors, and the bytes before them."""

    order: list[str]
    header: bytes


def _layout(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Layout:
    """The layout that safetensors itself would choose, with sorted metadata: the same content gives the same file."""
    entries = {}
    for name, tensor in tensors.items():
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        entries[name] = (_DTYPE_NAMES[stored], list(tensor.shape), tensor.numel() * stored.itemsize)
    order = sorted(entries, key=lambda name: (-_DTYPE_RANK[entries[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        kind, shape, size = entries[name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return Layout(order, struct.pack("<Q", len(text)) + text)


def _streamed(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, order: list[str]) -> Iterator[memoryview]:
    """The tensors' bytes in order; only one tensor at a time is copied."""
    for name in order:
        yield _bytes_of(_cast(tensors[name].detach(), dtype).cpu().contiguous())


class Hashes(NamedTuple):
    """Names of a file that other programs look it up by: SHA-256 in full, and the first 8 digits of a short one."""

    sha256: str
    legacy: str


def hash_tensors(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> Hashes:
    """Hashes of the safetensors file that `write_tensors` would write, which is not written: `sha256` of everything
    after its header, `legacy` of the 0x10000 bytes from offset 0x100000.
    """
    order, header = _layout(tensors, dtype, metadata or {})
    whole, window, position = hashlib.sha256(), hashlib.sha256(), len(header)
    window.update(header[_LEGACY_HASH_START : _LEGACY_HASH_START + _LEGACY_HASH_BYTES])
    for data in _streamed(tensors, dtype, order):
        whole.update(data)
        first, last = _LEGACY_HASH_START - position, _LEGACY_HASH_START + _LEGACY_HASH_BYTES - position
        window.update(data[max(first, 0) : max(last, 0)])
        position += len(data)
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


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends without an error; until then `path` stays as it is.

    UserError if the folder or the disk does not take it; nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # where the folder does not exist or is not ours, neither does the file
            temporary.unlink(missing_ok=True)
        # PyTorch's archive writer puts an error of its own in front of the disk's
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise UserError(f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


def stores_metadata(path: str | os.PathLike) -> bool:
    """Whether a file of this name keeps metadata, which only .safetensors does."""
    return Path(path).suffix.lower() == SAFETENSORS_SUFFIX


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to `path`, in the format its suffix names: .safetensors, or .ckpt/.pt (which keeps no metadata).

    Floating-point tensors are stored as `dtype` if one is given. The same content gives the same bytes. UserError if
    the place cannot be written or the suffix is unknown.
    """
    if stores_metadata(path):
        order, header = _layout(tensors, dtype, metadata or {})
        with replacing(path) as file:
            file.write(header)
            for data in _streamed(tensors, dtype, order):
                file.write(data)
    elif Path(path).suffix.lower() in PICKLE_SUFFIXES:
        with replacing(path) as file:
            torch.save(
                {name: _of_its_own(_cast(tensor.detach(), dtype).cpu()) for name, tensor in tensors.items()}, file
            )
    else:
        raise UserError(f"{path}: the name of a weights file ends in .safetensors or .ckpt")
