"""The edges in pictures, found as J. Canny describes it in "A Computational Approach to Edge Detection" (1986)."""

from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from library.data.decode import decode
from library.errors import UserError
from library.preprocessing.pictures import find_pictures
from library.preprocessing.results import (
    SAVED_AS,
    Again,
    is_done,
    note_in,
    own_stems,
    remove_leftovers,
    save_picture,
    state_of,
)
from library.preprocessing.tally import Tally, prepared
from library.tool_files import check_writable

_JOURNAL = ".canny.unfinished"
_NOTE = "Canny"  # the name under which a PNG says with which thresholds it was made


@dataclass(frozen=True)
class Thresholds:
    """How steep the brightness has to be: `low` where an edge goes on, `high` somewhere on it; in any order. As sums of
    the differences in both directions, each of Sobel's operator: 0 to 2040.
    """

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low} {self.high}"


def edges(colours: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Edges of RGB (H, W, 3) as uint8 (H, W): 255 on an edge, else 0."""
    grey = cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_RGB2GRAY)
    return cv2.Canny(grey, thresholds.low, thresholds.high)


def edges_of(source: Path, output: Path, thresholds: Thresholds, *, recursive: bool, force: bool, threads: int) -> None:
    """Write the edges of a picture, or of those in a folder as a .png of the same name each; with `recursive`, also of
    those in the folders below, in folders of the same names.

    What is there, and not older than its picture, stays, unless it says that it was made with other thresholds, or
    `force` is given. Raises UserError if there is no picture, and for what cannot be written.
    """
    of_folder = source.is_dir()
    targets = _of_folder(source, output, recursive) if of_folder else _of_picture(source, output)
    pictures = list(targets)
    check_writable("--output", targets[pictures[0]])
    names = {target.name for target in targets.values()}
    for folder in {target.parent for target in targets.values()}:
        remove_leftovers(folder, names.__contains__)
    # a picture that is named is meant to be written
    accepted = {str(thresholds)} | ({None} if of_folder else set())
    again = Again(output / _JOURNAL, source, asdict(thresholds), force=force) if of_folder else None

    def attend(picture: Path) -> bool:
        target, state = targets[picture], state_of(picture)
        anew = again.wants(picture) if again else force
        if not anew and is_done(target, state) and note_in(target, _NOTE) in accepted:
            return False
        colours, _ = decode(picture, keep_alpha=False, legacy=False)
        save_picture(target, edges(colours, thresholds), state, (_NOTE, str(thresholds)))
        if again:
            again.note(picture)
        return True

    with Tally() as tally:
        for _, written in prepared(pictures, attend, tally, threads=threads, doing="edges"):
            tally.written += written
            tally.skipped += not written
        if again:
            again.finish()
        tally.tell("pictures of edges", "CPU")


def _of_picture(source: Path, output: Path) -> dict[Path, Path]:
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder, give the name of a picture in it")
    if output.suffix.lower() not in SAVED_AS:
        raise UserError(f"--output: {output} ends in none of {', '.join(SAVED_AS)}")
    return {source: output}


def _of_folder(source: Path, output: Path, recursive: bool) -> dict[Path, Path]:
    stems = own_stems(find_pictures("--input", source, recursive=recursive))
    return {picture: output / picture.relative_to(source).with_name(stem + ".png") for picture, stem in stems.items()}
