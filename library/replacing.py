"""Files and folders that appear under their names only when they are whole. Imports no torch.

What is being written has a name of its own beside the final one: `<name>.<process>.tmp` for a file, `<name>.tmp` for a
folder. A process that is killed leaves those, and nothing else, behind.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from library.errors import UserError

_CLOCKS = 10  # seconds by which the times of files and processes may disagree


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends without an error; until then `path` stays as it is.

    UserError if the folder or the disk does not take it; nothing half-written is left. Of several processes that
    write one name, the last to finish wins.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def working_names(folder: Path) -> tuple[Path, Path]:
    """The names of the folder that is filled, and of the one that it replaces until it is whole."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.replaced.tmp")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends without an error and not before. What is there by
    that name is lost then, and so is what lies under the `working_names`.

    UserError if the folder or the disk does not take it; then everything is as it was.
    """
    folder = folder.resolve()  # `.` has a name of its own, and of a link the folder behind it is replaced
    temporary, old = working_names(folder)
    try:
        put_back(folder)
        for left in (temporary, old):
            if left.exists():
                shutil.rmtree(left)
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            put_back(folder)
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo what was done of a replacement if its process was killed when neither folder had the name."""
    _, old = working_names(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def remove(path: Path) -> None:
    """Delete a file or folder of ours so that, whenever this is stopped, nothing incomplete has its name."""
    if path.is_dir() and not path.is_symlink():
        temporary, _ = working_names(path)
        shutil.rmtree(temporary, ignore_errors=True)
        os.replace(path, temporary)
        shutil.rmtree(temporary)
    else:
        path.unlink(missing_ok=True)


def clean_up(folder: Path, names: str) -> None:
    """Remove what killed processes left in a folder of what was to get a name that the pattern `names` matches. What
    a process that lives is writing stays.
    """
    left = [entry for entry in folder.iterdir() if entry.name.endswith(".tmp")]
    for entry in left:
        final = re.sub(r"(\.replaced|\.\d+)?\.tmp$", "", entry.name)
        if not re.fullmatch(names, final):
            continue
        with suppress(OSError):  # what cannot be removed is in nobody's way
            if entry.name.endswith(".replaced.tmp"):
                put_back(folder / final)
            if entry.exists() and not _in_hand(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _in_hand(entry: Path) -> bool:
    """Whether the process that a file is named after may still be writing it."""
    number = re.search(r"\.(\d+)\.tmp$", entry.name)
    if number is None or int(number[1]) == os.getpid():
        return False
    try:
        # a process that started after the file was written to only has its writer's number
        return psutil.Process(int(number[1])).create_time() <= entry.stat().st_mtime + _CLOCKS
    except psutil.NoSuchProcess:
        return False
    except (OSError, psutil.AccessDenied):
        return True


def _sync(folder: Path) -> None:
    """Have the disk know the names in a folder, where the system lets one ask for that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
