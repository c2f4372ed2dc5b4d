"""Files of named NumPy arrays beside the images: written whole or not at all, read without trusting them."""

import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Arrays = dict[str, np.ndarray]


class Header(NamedTuple):
    """What a file says of an array ahead of its numbers."""

    shape: tuple[int, ...]


# What damaged files make zipfile and NumPy raise.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    SyntaxError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(path: str | os.PathLike, names: Collection[str] | None = None) -> Arrays | None:
    """The arrays in an .npz file, or those of `names` that it has; None where it is missing, truncated or no .npz file.

    Never runs code that is in the file.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            return None
        with content as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except _UNREADABLE:
        return None


def read_headers(path: str | os.PathLike, names: Collection[str] | None = None) -> dict[str, Header] | None:
    """`read_arrays` without the numbers: only the zip's list of names and the first bytes of each array are read."""
    headers = {}
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.namelist():
                name = member.removesuffix(".npy")
                if names is None or name in names:
                    with file.open(member) as array:
                        read = _HEADERS[np.lib.format.read_magic(array)]
                        headers[name] = Header(read(array)[0])
    except _UNREADABLE:
        return None
    return headers


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file that takes the place of `path` when it is whole; the same arrays give the same bytes.

    Raises OSError as the disk does, and then leaves what was there before.
    """
    update_arrays(path, lambda: arrays)


def update_arrays(path: str | os.PathLike, make: Callable[[], Mapping[str, np.ndarray]]) -> None:
    """`write_arrays` of what `make` returns, which is called while no other process of ours writes in the same folder.

    So `make` may read the file and return what it held with something added. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with _writing_in(path.parent):
        arrays = make()
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process; goes on without one where the system has none."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
