"""What an unfinished run of a tool is done with: the same command goes on from there.

Where a result is a file that was not there before, that file says it all. This is for the rest: files that are made
again, or added to, and results that are gathered in one file at the end.
"""

import errno
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from library.errors import UserError, some

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Journal:
    """A file of JSON lines that is there as long as a run is unfinished; its first line says for what.

    A line that a kill or a crash of the machine cut off is dropped, and so is what was noted for another purpose, as
    for other thresholds; if this is the `only_copy` of that, it stays, and is a UserError. UserError also if the file
    cannot be written, or if another process has it, which the system has to tell. As a context it is closed at the end,
    and removed if nothing is noted in it.
    """

    def __init__(self, path: Path, purpose: Mapping[str, Any], *, only_copy: bool = False):
        self.path = path
        self.done: dict[str, Any] = {}
        """What was noted, by name, also in the run that was not finished."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as problem:
            raise self._unwritten(problem) from None
        try:
            if not _locked(self._file):
                raise UserError(f"{path}: another run is at work on this, wait for its end")
            self._take_up(json.dumps(purpose, sort_keys=True).encode() + b"\n", only_copy)
        except BaseException:
            self.close()
            raise

    def _take_up(self, head: bytes, only_copy: bool) -> None:
        """Read what counts of the file into `done`, and take the rest away."""
        self._file.seek(0)
        first = self._file.readline()
        whole = len(head) if first == head else 0
        if whole:
            for line in self._file:
                entry = _entry(line)
                if entry is None:
                    break
                self.done[entry[0]] = entry[1]
                whole += len(line)
        elif only_copy and (number := sum(_entry(line) is not None for line in self._file)):
            raise UserError(
                f"{self.path} has what a run with {_differences(first, head)} did, for {number} pictures: "
                "go on with the same flags, or delete it"
            )
        try:
            self._file.truncate(whole)
            if not whole:
                self._file.write(head)
                self._file.flush()
        except OSError as problem:
            if not whole:
                self.path.unlink(missing_ok=True)
            raise self._unwritten(problem) from None

    def note(self, name: str, value: Any = None) -> None:
        """That the picture of this name is done, with what is to be kept of it: anything that JSON can hold. Any thread
        may say so.
        """
        with self._lock:
            self.done[name] = value
            try:
                self._file.write(json.dumps([name, value]).encode() + b"\n")
                self._file.flush()
            except OSError as problem:
                raise self._unwritten(problem) from None

    def finish(self) -> None:
        """The run is at its end."""
        if fcntl is None:  # Windows, where open files are not removed
            self.close()
        with suppress(PermissionError):  # there, another run's
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """The run is broken off."""
        with suppress(OSError):  # of a full disk, which has been said
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.done:
            self.close()
        else:
            self.finish()

    def _unwritten(self, problem: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {problem.strerror or problem}")


def _locked(file: IO[bytes]) -> bool:
    """Whether this process has the file now, for as long as it is open; True too where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:  # some network disks lock nothing
        return problem.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _entry(line: bytes) -> tuple[str, Any] | None:
    """The name and the value in a line; None if it is not whole."""
    try:
        name, value = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (name, value) if line.endswith(b"\n") and isinstance(name, str) else None


def _differences(first: bytes, head: bytes) -> str:
    """What another purpose has that this one has not, in words."""
    with suppress(ValueError, AttributeError):
        there, here = json.loads(first), json.loads(head)
        if others := [f"{name} {value}" for name, value in there.items() if (name, value) not in here.items()]:
            return some(others)
    return "other flags"
