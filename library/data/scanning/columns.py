"""Texts by the million without an object for each: one blob of bytes, and where each of them lies in it."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


def encoded(text: str) -> bytes:
    """UTF-8; what is no text, as some file names are not, survives."""
    return text.encode("utf-8", "surrogateescape")


def decoded(data: bytes) -> str:
    """What `encoded` was given."""
    return data.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Texts:
    """N texts in memory; several may share their place in the blob."""

    blob: bytes | bytearray | np.ndarray
    starts: np.ndarray
    """(N,) int64"""
    lengths: np.ndarray
    """(N,) int32 bytes; -1 where there is no text"""

    @classmethod
    def of(cls, texts: Iterable[str | bytes | None]) -> "Texts":
        """The texts (bytes: as `encoded` makes them) one after the other."""
        blob, lengths = bytearray(), array("i")
        for text in texts:
            data = text if isinstance(text, bytes) else encoded(text or "")
            blob += data
            lengths.append(-1 if text is None else len(data))
        return cls.packed(blob, np.array(lengths, dtype=np.int32))

    @classmethod
    def of_names(cls, names: list[str]) -> "Texts":
        """`of` for a list that is likely plain ASCII, where a text's length is its bytes."""
        joined = "".join(names)
        if not joined.isascii():
            return cls.of(names)
        return cls.packed(joined.encode(), np.fromiter(map(len, names), np.int32, len(names)))

    @classmethod
    def packed(cls, blob: bytes | bytearray | np.ndarray, lengths: np.ndarray) -> "Texts":
        """Texts that lie one after the other in the blob."""
        bytes_each = np.maximum(lengths, 0).astype(np.int64)
        return cls(blob, np.cumsum(bytes_each) - bytes_each, lengths.astype(np.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> str:
        start = int(self.starts[index])
        return decoded(bytes(self.blob[start : start + max(int(self.lengths[index]), 0)]))

    def take(self, rows: np.ndarray) -> "Texts":
        """The texts of some rows, sharing the blob."""
        return Texts(self.blob, self.starts[rows], self.lengths[rows])

    def joined(self, other: "Texts") -> "Texts":
        """These texts and then those."""
        if not len(self):
            return other
        starts = np.concatenate([self.starts, other.starts + len(self.blob)])
        return Texts(b"".join((self.blob, other.blob)), starts, np.concatenate([self.lengths, other.lengths]))

    def compact(self) -> "Texts":
        """The same texts in a blob that holds nothing else."""
        packed = Texts.packed(self.blob, self.lengths)
        if np.array_equal(self.starts, packed.starts) and np.maximum(self.lengths, 0).sum() == len(self.blob):
            return self
        stops = self.starts + np.maximum(self.lengths, 0)
        view = memoryview(self.blob)
        pieces = [view[start:stop] for start, stop in zip(self.starts.tolist(), stops.tolist(), strict=True)]
        return Texts.packed(b"".join(pieces), self.lengths)

    def filled(self, text: str) -> "Texts":
        """`text` where there is none; all of them share one place."""
        none, data = self.lengths < 0, encoded(text)
        if not none.any():
            return self
        starts = np.where(none, len(self.blob), self.starts)
        return Texts(b"".join((self.blob, data)), starts, np.where(none, len(data), self.lengths).astype(np.int32))


class TextWriter:
    """A growing column of texts in a folder: the blob goes to its file at once."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.file = open(f"{self.path}.bin", "wb")  # noqa: SIM115, closed when the column is whole
        self.starts: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []

    def extend(self, texts: Texts) -> None:
        self.starts.append(texts.starts + self.file.tell())
        self.lengths.append(np.maximum(texts.lengths, 0))
        self.file.write(texts.blob)

    def close(self) -> None:
        self.file.write(b"\0")  # an empty file cannot be mapped; nobody reads this byte
        self.file.close()
        np.save(f"{self.path}.starts.npy", np.concatenate([np.empty(0, np.int64), *self.starts]))
        np.save(f"{self.path}.lengths.npy", np.concatenate([np.empty(0, np.int32), *self.lengths]).astype(np.int32))


class TextColumn:
    """What a `TextWriter` wrote, memory-mapped."""

    def __init__(self, folder: Path, name: str):
        self._blob = np.memmap(folder / f"{name}.bin", dtype=np.uint8, mode="r")
        self._starts = np.load(folder / f"{name}.starts.npy", mmap_mode="r")
        self._lengths = np.load(folder / f"{name}.lengths.npy", mmap_mode="r")

    def __getitem__(self, index: int) -> str:
        start = int(self._starts[index])
        return decoded(self._blob[start : start + int(self._lengths[index])].tobytes())
