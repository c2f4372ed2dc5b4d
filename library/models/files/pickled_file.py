"""PyTorch's own files of tensors (.ckpt, .pt, .pth, .bin), read without executing code and written tensor by tensor."""

import ctypes
import mmap
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.models.files.weights_file import HeldTensors, bytes_to_store, cast, outlines_of, stored_dtype

# What training programs leave beside the weights. It is read as nothing: none of these classes is ever imported.
_PASSED_OVER = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)

_PARAMETERS = "torch.nn.modules.container.ParameterDict"

# The classes by which files name number formats; newer formats have none and name themselves.
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_MAGIC_NUMBER = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # as pickled, in the first bytes of files of PyTorch 1.5
_FOLDER = "archive"
_ALIGNMENT = 64  # PyTorch's, so that mapped tensors begin where their numbers may
_PADDING = b"FB"  # the name that PyTorch gives to the field that is only there for the alignment
_LARGE_RECORD = 2_000_000_000  # from here on a record's sizes are written in 64 bits


class _PassedOver:
    """Stands for an object of a class that is not needed."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Parameters:
    """Stands for a torch.nn.ParameterDict, in which older files of Textual Inversions keep their vectors."""

    tensors: Mapping[str, Tensor] = MappingProxyType({})

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict) and isinstance(state.get("_parameters"), dict):
            self.tensors = state["_parameters"]


class PickledFile(HeldTensors):
    """An open file of `torch.save`; tensors come off the disk when they are asked for, except in files of PyTorch 1.5
    and older, which are read at once. UserError if it is damaged or would run code.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata = {}
        self._mapped: set[tuple[int, int]] = set()  # addresses and sizes of what lies in the mapped file
        content = _load(path, self._mapped if _can_be_mapped(path) else None)
        while isinstance(content, dict) and (inner := _inner(content)) is not None:
            content = inner
        entries = content.items() if isinstance(content, dict) else ()
        self._tensors = {
            key: value.detach() for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)
        }
        if not self._tensors:
            raise UserError(f"{path} holds no named tensors, so it is not a model")

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        stored = self._tensors[key]
        tensor = cast(stored, dtype)
        own = tensor.clone(memory_format=torch.contiguous_format) if tensor is stored else tensor.contiguous()
        # other memory must not be given back: a tensor can also be listed in the pickle, number by number
        if (place := _place(stored.untyped_storage())) in self._mapped:
            _give_back(*place)
        return own

    def verify(self) -> None:
        if not zipfile.is_zipfile(self.path):
            return
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(self.path) as archive:
            if archive.testzip() is None:
                return
        raise UserError(f"{self.path} is damaged: its contents do not have the checksums beside them, copy it again")


def _inner(content: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """The tensors of a model beside which other things are kept, or those of a Textual Inversion of the web UI."""
    for name in ("state_dict", "string_to_param"):
        inner = content.get(name)
        inner = inner.tensors if isinstance(inner, _Parameters) else inner
        if isinstance(inner, Mapping):
            return inner
    return None


def _can_be_mapped(path: Path) -> bool:
    """Whether the tensors lie in the file as they would in memory: in a zip archive, neither packed nor swapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            orders = [archive.read(record) for record in records if record.filename.endswith("/byteorder")]
    except Exception:  # not an archive; or a damaged one, which fails in many ways, and `_load` says so
        return False
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    return stored and all(order == sys.byteorder.encode() for order in orders)


def _place(storage: torch.UntypedStorage) -> tuple[int, int]:
    return storage.data_ptr(), storage.nbytes()


def _load(path: Path, mapped: set[tuple[int, int]] | None) -> Any:
    """The file's content; maps it into memory if `mapped` is a set, which gets the places of the tensors there."""

    def stay(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if mapped is not None:
            mapped.add(_place(storage))
        return storage  # wherever it was when it was saved

    try:
        stand_ins = [(_PassedOver, name) for name in _PASSED_OVER] + [(_Parameters, _PARAMETERS)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location=stay, weights_only=True, mmap=mapped is not None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            raise UserError(
                f"{path} holds more than tensors, which could run code when it is opened, so it is not read: "
                "convert it to .safetensors where you trust it, or use a .safetensors copy of the model"
            ) from error
        if _is_other_pickle(path):
            raise UserError(
                f"{path} is a pickle but no PyTorch weights file, and could run code when it is opened, so it is not "
                "read: use a .safetensors copy of the model"
            ) from error
        raise UserError(f"{path} is no PyTorch weights file, or is damaged or incomplete: copy it again") from error


def _is_other_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle does and not as PyTorch's own files of pickles."""
    with path.open("rb") as file:
        start = file.read(32)
    return start[:1] == b"\x80" and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]) and _MAGIC_NUMBER not in start


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    with suppress(OSError, AttributeError, TypeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return function
    return None


_madvise = _find_madvise()


def _give_back(address: int, size: int) -> None:
    """Let go of the pages that a tensor of a mapped file was read through: they count as memory of this process.

    They are copies of what the file holds, never written to, so nothing is lost: a second look reads them again.
    """
    if _madvise is not None and size:
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(first, address + size - first, mmap.MADV_DONTNEED)


class _Storage(NamedTuple):
    """A record of the archive, as the pickle refers to it; `size` counts elements of `kind`."""

    kind: type
    record: str
    size: int


class _Stored(NamedTuple):
    """A tensor whose numbers are in a record of the archive."""

    record: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def how_to_rebuild(self) -> tuple[Callable, tuple]:
        """The function and arguments that PyTorch itself writes for such a tensor."""
        outline = torch.empty(self.shape, dtype=self.dtype, device="meta")
        place = (0, tuple(self.shape), outline.stride(), False, OrderedDict())
        if kind := _STORAGES.get(self.dtype):
            return torch._utils._rebuild_tensor_v2, (_Storage(kind, self.record, outline.numel()), *place)
        storage = _Storage(torch.UntypedStorage, self.record, outline.nbytes)
        return torch._utils._rebuild_tensor_v3, (storage, *place, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, _Storage):
            return ("storage", value.kind, value.record, "cpu", value.size)
        return None

    def reducer_override(self, value: object) -> Any:
        return value.how_to_rebuild() if isinstance(value, _Stored) else NotImplemented


def write_pickled(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    beside: Mapping[str, int] | None = None,
) -> None:
    """Write what `torch.save` of a dictionary of the tensors would, without metadata and with names in order. With
    numbers `beside` them, also with none, that dictionary is the entry `state_dict` of another, as in whole models.

    `torch.save` would need all of them in memory at once, in their final format: it takes complete objects only.
    """
    outlines = outlines_of(tensors)
    names = sorted(outlines)
    # The pickler writes an object that it has met as a reference: whether names are those objects must not be chance.
    content: dict[str, Any] = {
        sys.intern(name): _Stored(str(number), tuple(outlines[name].shape), stored_dtype(outlines[name], dtype))
        for number, name in enumerate(names)
    }
    if beside is not None:
        content = {"state_dict": content, **{sys.intern(name): number for name, number in sorted(beside.items())}}
    pickled = BytesIO()
    _Pickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(file, "w") as archive:
        _write_record(archive, file, "data.pkl", memoryview(pickled.getvalue()))
        _write_record(archive, file, "byteorder", memoryview(sys.byteorder.encode()))
        for number, name in enumerate(names):
            _write_record(archive, file, f"data/{number}", bytes_to_store(name, tensors[name], outlines[name], dtype))
        _write_record(archive, file, "version", memoryview(b"3\n"))


def _write_record(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: memoryview) -> None:
    """Add a record whose data begin at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"{_FOLDER}/{name}")  # of 1980, the first date of the format
    entry.create_system, entry.file_size = 3, data.nbytes
    large = data.nbytes > _LARGE_RECORD
    # before the data: the fixed part, the name, the padding's own head, and the sizes of a large record
    head = 30 + len(entry.filename) + 4 + (20 if large else 0)
    padding = -(file.tell() + head) % _ALIGNMENT
    entry.extra = _PADDING + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as record:
        record.write(data)
