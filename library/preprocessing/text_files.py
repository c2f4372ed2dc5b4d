"""The text file beside each picture that a tool writes: a caption, or tags."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.console import notice
from library.preprocessing.journal import Journal
from library.preprocessing.pictures import clean_up_beside, text_file, with_dot
from library.replacing import replacing
from library.tool_files import check_writable


class TextFiles:
    """The files of the pictures in a folder; `again`: they are written also where there are some, and a journal tells
    what an unfinished run has done of that. What is in it counts as long as neither picture nor text have changed.
    """

    def __init__(self, what: str, folder: Path, extension: str, *, again: bool):
        """`what` is written; `extension` as the user gives it. UserError if it is none for texts."""
        self.what = what
        self.folder = folder
        self.extension = with_dot(extension)
        self.again = again
        self._journal: Journal | None = None

    def of(self, picture: Path) -> Path:
        """A picture's file."""
        return text_file(picture, self.extension)

    def left(self, pictures: Sequence[Path]) -> list[Path]:
        """The pictures that are to get a file. UserError if a folder takes none. What killed processes left goes."""
        left = [picture for picture in pictures if self.again or not self.of(picture).exists()]
        for folder in sorted({picture.parent for picture in left}):
            check_writable("train_data_dir", folder / self.what)
        clean_up_beside(left, self.extension)
        return left

    def go_on(self, purpose: Mapping[str, Any], pictures: list[Path]) -> list[Path]:
        """The pictures that are left when those are left out that an unfinished run for the same `purpose` has done."""
        if not self.again:
            return pictures
        self._journal = Journal(self.folder / f".{self.what}{self.extension}.unfinished", purpose)
        left = [picture for picture in pictures if not self._is_done(picture)]
        tell_done(len(pictures) - len(left), self.what)
        return left

    def write(self, picture: Path, text: str) -> None:
        """UserError if that cannot be done."""
        with replacing(self.of(picture)) as file:
            file.write(f"{text}\n".encode("utf-8", "replace"))

    def done(self, picture: Path) -> None:
        """A picture's file is as it should be."""
        if self._journal is not None:
            self._journal.note(self._name(picture), self._times(picture))

    def finish(self) -> None:
        """All is done."""
        if self._journal is not None:
            self._journal.finish()

    def __enter__(self) -> "TextFiles":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._journal is not None:
            self._journal.__exit__(*error)

    def _name(self, picture: Path) -> str:
        return os.path.relpath(picture, self.folder)

    def _is_done(self, picture: Path) -> bool:
        noted = self._journal.done.get(self._name(picture))
        return noted is not None and noted == self._times(picture)

    def _times(self, picture: Path) -> list[int] | None:
        """When text and picture were changed; None if one of them is gone."""
        try:
            return [path.stat().st_mtime_ns for path in (self.of(picture), picture)]
        except OSError:
            return None


def tell_done(number: int, what: str) -> None:
    """Say how many pictures a run that was stopped is done with."""
    if number:
        notice(f"{what}: {number} {'is' if number == 1 else 'are'} done by a run that was stopped, and stay so")
