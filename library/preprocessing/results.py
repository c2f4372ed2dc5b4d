"""The files that a tool makes of pictures or copies: done when they are there and not older than what they are of."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.data.decode import BrokenImage
from library.errors import UserError
from library.preprocessing.journal import Journal
from library.replacing import clean_up, replacing

_SECOND = 10**9  # ns

# How pictures are written, by the ending of their name: with nothing lost where the format can, else with all colours.
_SAVING = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 100, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 100, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
    ".bmp": {"format": "BMP"},
}
SAVED_AS = tuple(_SAVING)
"""The endings that `save_picture` knows."""
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}


class Again:
    """Which of the pictures of `source` a run with --force has still to do again, also if it goes on with one that was
    stopped: that is kept in a file at `path` until the end. Any thread may ask and note.
    """

    def __init__(self, path: Path, source: Path, purpose: Mapping[str, Any], *, force: bool):
        self._path, self._source = path, source
        self._journal = Journal(path, {"source": os.path.abspath(source), **purpose}) if force else None
        self._done = frozenset(self._journal.done if self._journal else ())

    def wants(self, picture: Path) -> bool:
        return self._journal is not None and self._name(picture) not in self._done

    def note(self, picture: Path) -> None:
        """That it is done."""
        if self._journal:
            self._journal.note(self._name(picture))

    def _name(self, picture: Path) -> str:
        return picture.relative_to(self._source).as_posix()

    def finish(self) -> None:
        """All is done, also what a stopped run with --force has left to do."""
        if self._journal:
            self._journal.finish()
        else:
            self._path.unlink(missing_ok=True)


def own_stems(pictures: Iterable[Path]) -> dict[Path, str]:
    """What the names of each picture's results begin with: its stem, or its whole name if an earlier one in its folder
    has the stem, as with the caches of latents.
    """
    taken: set[str] = set()
    stems = {}
    for picture in pictures:
        stem = picture.stem if os.path.normcase(picture.with_suffix("")) not in taken else picture.name
        taken.add(os.path.normcase(picture.with_name(stem)))
        stems[picture] = stem
    return stems


def is_done(target: Path, source: os.stat_result) -> bool:
    """Whether a file is there and not older than the one that it is made of."""
    try:
        time = target.stat().st_mtime_ns
    except OSError:
        return False
    rounded = 2 * _SECOND if time % _SECOND == 0 else _SECOND // 100  # by file systems of memory sticks
    return time > source.st_mtime_ns - rounded


def is_newer(target: Path, source: os.stat_result) -> bool:
    """Whether a file that is there has a later time than that of what it is made of, which files are given here."""
    return target.stat().st_mtime_ns > source.st_mtime_ns + 2 * _SECOND


def state_of(source: Path) -> os.stat_result:
    """What the system says of a file that is read. Raises BrokenImage if it does not."""
    try:
        return source.stat()
    except OSError as problem:
        raise _unreadable(source, problem) from None


def copy_file(source: Path, target: Path) -> None:
    """A whole copy, as old as the original. BrokenImage if the original cannot be read, UserError as `replacing`."""
    state = state_of(source)
    try:
        original = source.open("rb")
    except OSError as problem:
        raise _unreadable(source, problem) from None
    with original:
        _write(target, state, lambda file: shutil.copyfileobj(original, file, 2**20))


def save_picture(target: Path, pixels: np.ndarray, source: os.stat_result, note: tuple[str, str] | None = None) -> None:
    """Write uint8 pixels (H, W), (H, W, 3) or (H, W, 4) as the target's ending says, as old as what they are of. `note`
    is a name and a text that a PNG is to carry. Raises UserError as `replacing`, BrokenImage if the format holds no
    picture as large.
    """
    options = dict(_SAVING[target.suffix.lower()])
    height, width = pixels.shape[:2]
    if max(height, width) > (largest := _LARGEST_SIDE.get(options["format"], max(height, width))):
        raise BrokenImage(f"{target.name} would be {width}x{height} pixels, and {target.suffix} holds {largest} a side")
    if note and options["format"] == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(*note)
    image = Image.fromarray(pixels)
    _write(target, source, lambda file: image.save(file, **options))


def _write(target: Path, source: os.stat_result, fill: Callable[[IO[bytes]], None]) -> None:
    try:
        with replacing(target) as file:
            fill(file)
    except UserError as problem:
        if getattr(problem.__cause__, "errno", None) == errno.ENAMETOOLONG:  # the fault of one picture, not of the disk
            raise BrokenImage(f"the name {target.name} is too long for the folder it is to be in") from None
        raise
    with suppress(OSError):  # where times cannot be set, the file is newer, which will do
        os.utime(target, ns=(source.st_atime_ns, source.st_mtime_ns))


def note_in(path: Path, name: str) -> str | None:
    """The text that a PNG carries by a name; None if there is none, or no PNG."""
    try:
        with Image.open(path) as image:
            return image.info.get(name)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what killed processes left in a folder of files whose names are to be ours."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        left = {found[1] for entry in entries if (found := re.fullmatch(r"(.+)\.\d+\.tmp", entry.name))}
    for name in left:
        if is_ours(name):
            clean_up(folder, re.escape(name))


def _unreadable(source: Path, problem: OSError) -> BrokenImage:
    return BrokenImage(f"{source.name} cannot be read ({problem.strerror or problem})")
