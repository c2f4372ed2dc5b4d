"""The .safetensors format, read and written by hand.

Its library (github.com/huggingface/safetensors) maps files into memory, and a cast on top of that needs up to three
times the bytes of the result; it orders metadata at random.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from library import console
from library.errors import UserError
from library.models.files.weights_file import WeightsFile, bytes_of, bytes_to_store, outlines_of, stored_dtype

CONTENT_HASH = "modelspec.hash_sha256"

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
_LARGEST_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 20
_NO_HASH = "0x" + "0" * 64  # keeps the place of a hash that is known only when everything is written

# Which program wrote a file, in its metadata, and how ours begins there.
_WRITER, _OURS = "modelspec.implementation_version", "atelier"
# Metadata that holds the SHA-256 of everything after the header, with or without 0x before it.
_HASHES_OF_CONTENT = (CONTENT_HASH, "sshs_model_hash")


class _Entry(NamedTuple):
    """Where a tensor lies, in bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile(WeightsFile):
    """An open .safetensors file. UserError if it is damaged, incomplete or something else."""

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
            header = json.loads(self._file.read(length), object_pairs_hook=_without_repeats)
            self.metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("metadata that is no text")
            self._check_formats(header)
            self._entries = {key: _entry(value) for key, value in header.items()}
            _check_no_overlap(self._entries.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: its header makes no sense, copy the file again") from error
        end = max((entry.end for entry in self._entries.values()), default=0)
        if self._data_start + end > size:
            missing = self._data_start + end - size
            raise UserError(f"{self.path} is incomplete: its last {missing:,} bytes are missing, copy it again")

    def _check_formats(self, header: dict[str, Any]) -> None:
        for key, value in header.items():
            if isinstance(kind := value["dtype"], str) and kind not in _DTYPES:
                raise UserError(
                    f"{self.path} holds {key!r} in a number format named {kind!r}, which cannot be read here: convert "
                    f"the file to one of {', '.join(sorted(_DTYPES))}, or copy it again if it should hold one of them"
                )

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        entry = self._entries[key]
        self._file.seek(self._data_start + entry.start)
        if dtype in (None, entry.dtype) or not entry.dtype.is_floating_point:
            return self._read(key, entry.shape, entry.dtype)
        tensor = torch.empty(entry.shape, dtype=dtype)
        # In pieces: a whole one in both formats needs more memory, in holes that stay behind, and is slower.
        for part in tensor.reshape(-1).split(_CHUNK // entry.dtype.itemsize):
            part.copy_(self._read(key, part.shape, entry.dtype))
        return tensor

    def _read(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Numbers in the stored format, from where the file stands."""
        tensor = torch.empty(shape, dtype=dtype)
        view = bytes_of(tensor)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise UserError(f"{self.path} ended while {key} was being read")
            view = view[count:]
        return tensor

    def verify(self) -> None:
        texts = [self.metadata.get(name, "").lower().removeprefix("0x") for name in _HASHES_OF_CONTENT]
        wanted = {text for text in texts if re.fullmatch("[0-9a-f]{64}", text)}
        if not wanted:
            return
        digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        self._file.seek(self._data_start)
        while count := self._file.readinto(chunk):
            digest.update(chunk[:count])
        if wanted == {digest.hexdigest()}:
            return
        if self.metadata.get(_WRITER, "").startswith(_OURS):
            raise UserError(
                f"{self.path} is damaged: its contents do not have the hash that its header tells, copy it again (a "
                "program that changes weights and keeps the old metadata leaves the same)"
            )
        # other programs are known to change weights and to keep a hash that was somebody else's
        console.warn(
            f"{self.path}: its contents do not have the hash that its header tells, so it is damaged, or a program has "
            "changed its weights and kept the old metadata"
        )

    def close(self) -> None:
        self._file.close()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(value: dict[str, Any]) -> _Entry:
    shape, (start, end) = value["shape"], value["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, start, end)):
        raise ValueError("a size or place that is no such number")
    dtype = _DTYPES[value["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape")
    return _Entry(dtype, tuple(shape), start, end)


def _check_no_overlap(entries: Iterable[_Entry]) -> None:
    reached = 0
    for entry in sorted((entry for entry in entries if entry.end > entry.start), key=lambda entry: entry.start):
        if entry.start < reached:
            raise ValueError("two tensors in one place")
        reached = entry.end


def _what_it_is(start: bytes) -> str:
    """The end of a sentence about a file that begins with these 8 bytes and is no file of tensors."""
    if not start:
        return "is empty, copy it again"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the model: fetch the real file with `git lfs pull`"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!do", b"<htm", b"<?xm", b"<hea")):
        return "is a web page, not a model: download the file itself, perhaps after logging in"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "is a text file, not a model: give a .safetensors or .ckpt file"
    return "is no model, or only the beginning of one: give a complete .safetensors or .ckpt file"


class Layout(NamedTuple):
    """Where a safetensors file puts its tensors, and the bytes before them."""

    order: list[str]
    header: bytes


def lay_out(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Layout:
    """The layout that safetensors itself would choose, with sorted metadata: the same content gives the same file."""
    entries = {}
    for name, outline in outlines_of(tensors).items():
        stored = stored_dtype(outline, dtype)
        entries[name] = (_DTYPE_NAMES[stored], list(outline.shape), outline.numel() * stored.itemsize)
    order = sorted(entries, key=lambda name: (-_DTYPE_RANK[entries[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        kind, shape, size = entries[name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = _compact(header)
    text += b" " * (-len(text) % 8)
    return Layout(order, struct.pack("<Q", len(text)) + text)


def _compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def stream(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, order: list[str], take: Callable[[memoryview], object]
) -> None:
    """Hand the tensors' bytes to `take`, in order: each tensor is made once, and is gone before the next is made."""
    outlines = outlines_of(tensors)
    for name in order:
        take(bytes_to_store(name, tensors[name], outlines[name], dtype))


def write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    content_hash: bool,
) -> None:
    """Write a whole file; with `content_hash`, its metadata has the SHA-256 of what is after the header."""
    order, header = lay_out(tensors, dtype, {**metadata, CONTENT_HASH: _NO_HASH} if content_hash else metadata)
    file.write(header)
    if not content_hash:
        stream(tensors, dtype, order, file.write)
        return
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as beside:
        hashed: list[Future[None]] = []

        def write_and_hash(data: memoryview) -> None:
            hashed.append(beside.submit(digest.update, data))
            file.write(data)
            if len(hashed) > 1:  # no more than two tensors are held
                hashed.pop(0).result()

        stream(tensors, dtype, order, write_and_hash)
    field = _compact({CONTENT_HASH: _NO_HASH})[1:-1]  # quotes within other values are escaped, so this is unique
    file.seek(header.index(field))
    file.write(field.replace(_NO_HASH.encode(), f"0x{digest.hexdigest()}".encode()))
