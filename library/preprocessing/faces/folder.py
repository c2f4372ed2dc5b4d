"""From a folder of pictures to one of faces, whose names tell where in the picture the face is."""

import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library.console import warn
from library.data.augment import Face
from library.data.decode import BrokenImage, decode, read_size
from library.data.scanning.listing import normalised
from library.errors import UserError, some
from library.options.detect_faces import DetectFacesOptions
from library.options.work import WorkOptions
from library.preprocessing.faces.crops import Detected, Wanted, in_whole_pixels, moved, plan, render
from library.preprocessing.faces.detectors import Detector
from library.preprocessing.journal import Journal
from library.preprocessing.results import (
    Again,
    is_done,
    note_in,
    own_stems,
    remove_leftovers,
    save_picture,
    state_of,
)
from library.preprocessing.tally import Tally, prepared

_JOURNAL = ".detect_face_rotate.unfinished"
_FACELESS = ".detect_face_rotate.faceless"
_NOTE = "Face"  # the name under which a file says of which picture and how it was made
_SUFFIX = ".png"
_PLACE = r"_\d+_\d+_\d+_\d+" + re.escape(_SUFFIX)  # at the end of names
_LARGEST_SIDE = 2**15 - 1  # of pictures that OpenCV can turn
_LISTED = 20
_GREEN = (0, 255, 0)


class FaceFiles:
    """The files of faces: those that are there, and what others are to be called."""

    def __init__(self, pictures: Sequence[Path], options: DetectFacesOptions):
        self._source, self._target, self._numbered = options.src_dir, options.dst_dir, options.multiple_faces
        self._stems = own_stems(pictures)
        self._mark = "_debug" if options.debug else ""
        self._found: dict[Path, list[tuple[int, Path]]] = {}
        """By the beginnings of names: the number of the face, 0 in a name without one, and the file."""
        for folder in {self._beginning(picture).parent for picture in pictures}:
            remove_leftovers(folder, lambda name: re.search(_PLACE + "$", name) is not None)
            self._search(folder)

    def _search(self, folder: Path) -> None:
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            for pattern in (f"(.+)(){_PLACE}", rf"(.+)_face(\d+){_PLACE}"):  # of both kinds: a picture may be `a_face1`
                if match := re.fullmatch(pattern, name, re.DOTALL):
                    found = self._found.setdefault(folder / normalised(match[1]), [])
                    found.append((int(match[2] or 0), folder / name))

    def _beginning(self, picture: Path) -> Path:
        folder = self._target / picture.parent.relative_to(self._source)
        return folder / f"{self._stems[picture]}{self._mark}"

    def name(self, picture: Path) -> str:
        """By what files tell whose they are. The folder's name is in it, as several folders may go to one."""
        return f"{self._source.resolve().name}/{picture.relative_to(self._source).as_posix()}"

    def of(self, picture: Path) -> dict[Path, int]:
        """The files that are there for a picture and say so, or say nothing and are of the kind that is wanted; with
        the number of the face, 0 in a name without one.
        """
        beginning = self._beginning(picture)
        found = {}
        for number, path in self._found.get(beginning.with_name(normalised(beginning.name)), ()):
            made = made_with(path)
            if made.get("picture") == self.name(picture) or (not made and self._numbered == (number > 0)):
                found[path] = number
        return found

    def path(self, picture: Path, number: int, face: Face) -> Path:
        """What to call the file of a face, the `number`-th of its picture."""
        beginning = self._beginning(picture)
        words = [beginning.name, *([f"face{number}"] if self._numbered else []), *map(str, face.centre + face.size)]
        return beginning.with_name("_".join(words) + _SUFFIX)


def made_with(path: Path) -> dict[str, object]:
    """What a file says of how it was made; nothing if it was not made here."""
    try:
        made = json.loads(note_in(path, _NOTE) or "{}")
    except ValueError:
        made = {}
    return made if isinstance(made, dict) else {}


class Faceless:
    """The pictures in which a detector finds no face, kept in a file for later runs; any thread may ask and add."""

    def __init__(self, path: Path, detection: dict[str, object]):
        self._path, self._detection, self._lock = path, detection, threading.Lock()
        self._journal = self._open() if path.exists() else None

    def _open(self) -> Journal:
        return Journal(self._path, {"of": "pictures without a face"})

    def holds(self, picture: Path, state: os.stat_result) -> bool:
        """Whether it was found to be one, and is as it was."""
        return self._journal is not None and self._journal.done.get(os.path.abspath(picture)) == self._value(state)

    def add(self, picture: Path, state: os.stat_result) -> None:
        if not self.holds(picture, state):
            with self._lock:
                self._journal = self._journal or self._open()
            self._journal.note(os.path.abspath(picture), self._value(state))

    def _value(self, state: os.stat_result) -> list[object]:
        return [state.st_size, state.st_mtime_ns, *self._detection.values()]


class Cutter:
    """Makes the files of pictures; any thread may ask for that."""

    def __init__(self, detector: Detector, files: FaceFiles, options: DetectFacesOptions):
        self.detector, self.files, self.options = detector, files, options
        self.wanted = Wanted(
            upright=options.rotate,
            face_size=options.resize_face_size,
            crop=options.crop,
            fit=options.resize_fit,
            ratio=options.ratio,
        )

    @property
    def detection(self) -> dict[str, object]:
        """What it depends on whether a face is found."""
        return {"model": Path(self.options.model).name, "threshold": self.detector.threshold}

    def note(self, picture: Path) -> dict[str, object]:
        """What files say of how they are made."""
        made = {"picture": self.files.name(picture), **self.detection, **asdict(self.wanted)}
        return json.loads(json.dumps(made))  # as it is read again

    def there(self, picture: Path, state: os.stat_result) -> int:
        """How many files there are of a picture; 0 unless they are as they would be now, or were not made here. Of
        several faces the first is written last, so that if it is there all are.
        """
        numbers = self.files.of(picture)
        first = 1 if self.options.multiple_faces else 0
        for path in (path for path, number in numbers.items() if number == first):
            if is_done(path, state) and made_with(path) in ({}, self.note(picture)):
                return sum((number > 0) == (first > 0) for number in numbers.values())
        return 0

    def write(self, picture: Path, state: os.stat_result) -> int | None:
        """Write a picture's faces, in place of what is there of it, and say how many; None if the picture is not of a
        size that is asked for. Raises BrokenImage.
        """
        shorter, longer = sorted(read_size(picture))
        if shorter < (self.options.min_size or 0) or longer > (self.options.max_size or longer):
            return None
        pixels, _ = decode(picture, keep_alpha=False, legacy=False)
        faces = self.detector.faces(pixels)
        count = len(faces) if self.options.multiple_faces else min(len(faces), 1)
        written = {self._write(picture, state, pixels, faces, number) for number in range(count, 0, -1)}
        for path in self.files.of(picture) if written else ():
            if path not in written:
                path.unlink(missing_ok=True)
        return count

    def _write(
        self, picture: Path, state: os.stat_result, pixels: np.ndarray, faces: Sequence[Detected], number: int
    ) -> Path:
        size = pixels.shape[1], pixels.shape[0]
        cut = plan(size, faces[number - 1], self.wanted)
        if cut.size[0] * cut.size[1] > 2 * Image.MAX_IMAGE_PIXELS:  # nobody could open it again
            raise BrokenImage(f"it would become {cut.size[0]}x{cut.size[1]} pixels")
        if cut.angle and max(size) > _LARGEST_SIDE:
            raise BrokenImage(f"with {size[0]}x{size[1]} pixels it is too large to be turned")
        result = render(pixels, cut)
        if self.options.debug:
            result = with_boxes(result, [moved(size, face, cut) for face in faces])
        path = self.files.path(picture, number, in_whole_pixels(moved(size, faces[number - 1], cut)))
        if (owner := made_with(path).get("picture", self.files.name(picture))) != self.files.name(picture):
            raise BrokenImage(f"{path} is there already, of another picture, {owner}")
        save_picture(path, result, state, (_NOTE, json.dumps(self.note(picture))))
        return path


def with_boxes(pixels: np.ndarray, faces: Sequence[Detected]) -> np.ndarray:
    """The picture with boxes around the faces and dots on their marks."""
    drawn = pixels.copy()
    thick = max(1, max(drawn.shape) // 256)
    for face in faces:
        if min(face.size) >= 1:
            place = in_whole_pixels(face)
            corner = [middle - side // 2 for middle, side in zip(place.centre, place.size, strict=True)]
            cv2.rectangle(drawn, (*corner, *place.size), _GREEN, thick)
            for x, y in face.marks:
                cv2.circle(drawn, (int(x), int(y)), 2 * thick, _GREEN, -1)
    return drawn


def cut_out_faces(pictures: Sequence[Path], detector: Detector, options: DetectFacesOptions, work: WorkOptions) -> None:
    """Write the faces of pictures that lie in --src_dir to --dst_dir, and tell what became of them. UserError if there
    is nothing to show for it, if the detector does not know what --rotate needs, or the disk is full.
    """
    if options.rotate and not detector.has_marks:
        raise UserError(
            "--rotate: this --model does not tell where eyes and mouth are, so that nobody knows how a face is turned: "
            "drop --rotate, or take YuNet"
        )
    cutter = Cutter(detector, FaceFiles(pictures, options), options)
    purpose = {name: str(value) for name, value in asdict(options).items()}
    again = Again(options.dst_dir / _JOURNAL, options.src_dir, purpose, force=work.force)
    known = Faceless(options.dst_dir / _FACELESS, cutter.detection)

    def attend(picture: Path) -> tuple[int, int] | None:
        """How many files were written, and how many there were; None if its size is not asked for."""
        state = state_of(picture)
        if not again.wants(picture):
            if there := cutter.there(picture, state):
                return 0, there
            if known.holds(picture, state):
                return 0, 0
        count = cutter.write(picture, state)
        if count == 0:
            known.add(picture, state)
        if count is not None:
            again.note(picture)
        return None if count is None else (count, 0)

    faceless, unwanted = [], []
    with Tally() as tally:
        for picture, counts in prepared(pictures, attend, tally, threads=work.threads, doing="cutting out faces"):
            written, there = counts or (0, 0)
            tally.written += written
            tally.skipped += there
            if not written and not there:
                (unwanted if counts is None else faceless).append(picture)
        again.finish()
        if faceless:
            smaller = "" if tally.written or tally.skipped else ", try a smaller --score_threshold"
            warn(f"no face is found in {len(faceless)} of the pictures: {_names(faceless)}{smaller}")
        if unwanted:
            warn(f"{len(unwanted)} of the pictures left out for --min_size or --max_size: {_names(unwanted)}")
        tally.tell("faces", detector.where)


def _names(pictures: Sequence[Path]) -> str:
    return some([*map(os.fspath, pictures)], _LISTED)
