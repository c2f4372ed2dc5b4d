"""Temporary folders that processes share and that disappear with the object, and process, that made them."""

import errno
import os
import platform
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from library.errors import UserError

_A_DAY = 86400  # seconds
# Process numbers mean something on one machine only, and a temporary folder may lie on a disk that several share.
_MACHINE = re.sub(r"\W", "-", platform.node())
_made: set[Path] = set()


class ScratchFolder:
    """A new temporary folder, deleted when this object is collected or its process ends.

    A process that is killed leaves its folders to the next one that makes some. Windows does not delete files that are
    still mapped, so owners should let go of their maps before they let go of this object.
    """

    def __init__(self, purpose: str):
        for folder in Path(tempfile.gettempdir()).glob(f"atelier_*_{_MACHINE}_*"):
            if _is_left_over(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"atelier_{os.getpid()}_{_MACHINE}_{purpose}_"))
        _made.add(self.path)
        weakref.finalize(self, _remove, self.path, os.getpid())


@contextmanager
def saying_if_full(folder: Path) -> Iterator[None]:
    """Turns a full disk under a temporary folder into a UserError with the remedy."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder.parent} is full: free some space, or set the environment variable TMPDIR to a folder on a larger "
            "disk"
        ) from None


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked loader worker holds a copy of the object, and must leave the folder alone
        shutil.rmtree(folder, ignore_errors=True)


def _is_left_over(folder: Path) -> bool:
    """Whether the process that made a folder has ended; False where this cannot be known."""
    try:
        number = int(folder.name.split("_")[1])
        if number == os.getpid():
            return folder not in _made
        # a process that started after the folder was written to only has its maker's number; clocks may be put right
        return psutil.Process(number).create_time() > folder.stat().st_mtime + _A_DAY
    except psutil.NoSuchProcess:
        return True
    except (ValueError, OSError, psutil.AccessDenied):
        return False
