"""By which key a metadata file has a picture: its absolute path, or its name without ending."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from library.data.scanning.listing import normalised

Picture = TypeVar("Picture", str, Path)


class Keys(Generic[Picture]):
    """The keys of the pictures of a folder, and the pictures of keys that a file has already, however they are written:
    with or without ending, with accents composed or not; paths also relative to the working folder.
    """

    def __init__(self, pictures: Sequence[Picture], *, full_path: bool):
        self.full_path = full_path
        self.pictures = pictures
        self._by_stem: dict[str, int] = {}
        self._by_name: dict[str, int] = {}  # of pictures that have the stem of an earlier one
        folders = {os.path.dirname(picture) for picture in pictures}
        self._folders = {_compared(os.path.abspath(folder)) for folder in folders}
        for row, picture in enumerate(pictures):
            name = self._name(picture)
            if self._by_stem.setdefault(os.path.splitext(name)[0], row) != row:
                self._by_name.setdefault(name, row)

    @property
    def sharing(self) -> list[Picture]:
        """The pictures whose name without ending is an earlier one's."""
        return [self.pictures[row] for row in self._by_name.values()]

    def new(self, picture: Picture) -> str:
        """The key of a picture that the file does not have; with its ending where without it means another picture."""
        if self.full_path:
            return os.path.abspath(picture)
        name = os.path.basename(picture)
        stem = os.path.splitext(name)[0]
        return stem if self.picture(stem) == picture else name

    def row(self, key: str) -> int | None:
        """The place among the pictures of that which a key in the file means; of several with one stem it is the first.
        None if it is none of them.
        """
        key = _compared(os.path.abspath(key) if self.full_path else key)
        row = self._by_stem.get(os.path.splitext(key)[0])
        if row is not None and self._name(self.pictures[row]) == key:
            return row
        return self._by_name.get(key, self._by_stem.get(key))

    def picture(self, key: str) -> Picture | None:
        """The picture that a key in the file means; None if it is none of these."""
        row = self.row(key)
        return None if row is None else self.pictures[row]

    def has_folder_of(self, key: str) -> bool:
        """Whether a key in the file is of a picture that is, or was, in a folder of these."""
        return not self.full_path or _compared(os.path.dirname(os.path.abspath(key))) in self._folders

    def _name(self, picture: Picture) -> str:
        return _compared(os.path.abspath(picture) if self.full_path else os.path.basename(picture))


def _compared(name: str) -> str:
    return os.path.normcase(normalised(name))
