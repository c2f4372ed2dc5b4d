"""What a scan reads of image and caption files: sizes from their first bytes, texts in whatever encoding."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from library.data import images
from library.data.buckets import Size
from library.data.scanning import headers

_FIRST_BYTES = (4096, 2**16, 2**18)  # most headers end in the first, nearly all others in the second
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_THREADS = 16
_CHUNK = 64  # files

Job = TypeVar("Job")
Answers = TypeVar("Answers")


class Caption(NamedTuple):
    """The text of a caption file in UTF-8, without blank edges; None if it cannot be read."""

    text: bytes | None
    unusual: bool = False
    """Whether it is in another encoding, so that it had to be guessed."""


def read_header(path: str, *, legacy: bool = False) -> tuple[Size, bool]:
    """((width, height), whether it is an animation) of an image file, as `images.read_size`. Raises BrokenImage."""
    data = b""
    try:
        file = os.open(path, _FLAGS)
        try:
            for length in _FIRST_BYTES:
                data += os.read(file, length)
                header = headers.parse(data)
                if header:
                    return header.size(legacy=legacy), header.animated
                if len(data) < length:
                    break
        finally:
            os.close(file)
    except OSError:
        pass  # Pillow says what is wrong
    return images.read_size(path, legacy=legacy), images.is_animated(path)


def read_caption(path: str) -> Caption:
    """A caption file's text."""
    try:
        file = os.open(path, _FLAGS)
        try:
            data = os.read(file, 65536)
            if len(data) == 65536:
                data += b"".join(iter(lambda: os.read(file, 65536), b""))
        finally:
            os.close(file)
    except OSError:
        return Caption(None)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return Caption(tidy(data.decode(encoding)))
    except UnicodeDecodeError:
        return Caption(tidy(data.decode("latin-1")), unusual=True)


def tidy(text: str) -> bytes:
    """Lines without blank edges, in UTF-8; what no text may hold becomes a question mark."""
    text = text.strip()
    if "\n" in text or "\r" in text:
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        text = "\n".join(line.strip() for line in lines)
    return text.encode("utf-8", "replace")


def in_chunks(read: Callable[[Sequence[Job]], Answers], jobs: Sequence[Job]) -> Iterator[Answers]:
    """`read` of the jobs in chunks, in order.

    By several threads where the files keep us waiting: on disks in a network or with a moving head. With files in
    memory threads would only quarrel about the interpreter, and double the time.
    """
    chunks = [jobs[start : start + _CHUNK] for start in range(0, len(jobs), _CHUNK)]
    wall, busy = time.perf_counter(), time.thread_time()
    yield from map(read, chunks[:1])
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    if wall < 4 * busy:
        yield from map(read, chunks[1:])
        return
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(read, chunks[1:])
    finally:
        pool.shutdown(cancel_futures=True)
