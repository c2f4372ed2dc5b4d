"""Metadata files that are read in one place and written in another, or in the same: no entry is lost on the way."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from library.console import warn
from library.data.scanning.members import read_members
from library.data.scanning.wording import counted
from library.errors import UserError, some, suggest_path
from library.replacing import clean_up
from library.tool_files import check_writable


def check_input(flag: str, path: Path) -> None:
    """UserError if the metadata file that `flag` names does not exist."""
    if not path.exists():
        raise UserError(f"{flag}: {path} does not exist{suggest_path(path, ('.json',))}")


def check_output(flag: str, path: Path) -> None:
    """UserError if the metadata file that `flag` names cannot be written. What killed processes left of it is
    removed.
    """
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder, give the name of a file in it, as {path / 'meta.json'}")
    check_writable(flag, path)
    if path.parent.is_dir():
        clean_up(path.parent, re.escape(path.name))


class MetadataFile:
    """The entries of a metadata file in its order, each name once: of several entries of one name the last, which is
    said; none without a `path`. Read anew each time; of the names only their hashes are kept. Raises UserError if it
    is no such file.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._hashes: set[int] = set()
        again: set[int] = set()
        members = 0
        for key, _ in self._members():
            (again if hash(key) in self._hashes else self._hashes).add(hash(key))
            members += 1
        self._repeated = Counter(key for key, _ in self._members() if hash(key) in again) if again else Counter()
        self._number = members - self._repeated.total() + len(self._repeated)
        if lost := [key for key, count in self._repeated.items() if count > 1]:
            count = counted(len(lost), "name is", "names are")
            warn(f"{path}: {count} there more than once, and the last entry of each counts: {some(lost)}")

    def __len__(self) -> int:
        return self._number

    def __contains__(self, key: str) -> bool:
        return hash(key) in self._hashes

    def _members(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return () if self.path is None else read_members(self.path)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        left = self._repeated.copy()
        for key, entry in self._members():
            if key in left:
                left[key] -= 1
                if left[key]:
                    continue
            yield key, entry


def warn_of_losses(old: Path, source: MetadataFile, but: Callable[[str], bool] = lambda key: False) -> None:
    """Say which entries a file loses that is made anew from another one; those that are made again, too, are named by
    `but`.
    """
    if not old.exists() or old.samefile(source.path):
        return
    try:
        lost = [key for key, _ in read_members(old) if key not in source and not but(key)]
    except UserError:
        return  # nothing that could be lost
    if lost:
        count = counted(len(lost), "entry is not there and is", "entries are not there and are")
        warn(f"{old} is made anew from {source.path}, and {count} lost: {some(lost)}")
