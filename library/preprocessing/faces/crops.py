"""What is written of a picture with a face: upright, scaled, cut out. Pure functions.

Places are (x, y) in pixels, y downwards; the first pixel reaches from 0 to 1, so that the middle of a picture is half
its size. Sizes are (width, height), pictures uint8 (H, W, 3).
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from library.data.augment import Face, resize
from library.data.buckets import Size

Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Detected:
    """A face that a detector has found: a box around it, and how sure the detector is of it, 0 to 1."""

    centre: Place
    size: tuple[float, float]
    score: float
    marks: tuple[Place, ...] = ()
    """Right eye, left eye, nose, right and left corner of the mouth, from the person's own view; or nothing."""

    @property
    def tilt(self) -> float:
        """By how many degrees it leans clockwise from upright, -180 to 180; 0 without marks.

        The line through the eyes and the one from them to the mouth both tell, the longer the better: of a face in
        profile the eyes are too close together.
        """
        if not self.marks:
            return 0.0
        right, left, _, *mouth = np.array(self.marks)
        across, down = left - right, np.mean(mouth, axis=0) - (right + left) / 2
        return math.degrees(math.atan2(across[1] - down[0], across[0] + down[1]))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be written of a picture."""

    upright: bool = False
    face_size: int | None = None
    """Pixels of the face's longer side."""
    crop: Size | None = None
    """Pixels around the face."""
    fit: bool = False
    """Whether the picture is scaled so that `crop` just fits into it."""
    ratio: tuple[float, float] | None = None
    """What is cut out around the face, in units of its longer side."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a picture becomes the written one: turned anticlockwise, first by `quarters` of a full turn, then by `angle`
    degrees around `pivot`, where its frame stays as it is; of that, `window` is scaled to `size`.
    """

    quarters: int
    angle: float
    pivot: Place
    window: tuple[int, int, int, int]
    """Left, top, right, bottom."""
    size: Size


def plan(picture: Size, face: Detected, wanted: Wanted) -> Cut:
    """What of a picture of this size is written. The face is in its middle, or as near to that as the picture's frame
    lets it; a crop in pixels is always filled, for which a smaller picture is enlarged.
    """
    quarters = round(face.tilt / 90) if wanted.upright else 0
    picture, face = _turned(picture, face, quarters)
    angle = face.tilt if wanted.upright else 0.0
    extent = max(_turned_size(face.size, angle))
    scale = 1.0 if wanted.face_size is None else wanted.face_size / extent
    if wanted.crop is not None:
        fitting = max(side / length for side, length in zip(wanted.crop, picture, strict=True))
        scale = fitting if wanted.fit else max(scale, fitting)
        lengths = [side / scale for side in wanted.crop]
    elif wanted.ratio is not None:
        lengths = [ratio * extent for ratio in wanted.ratio]
    else:
        lengths = list(picture)
    lengths = [min(length, max(1, round(side))) for side, length in zip(lengths, picture, strict=True)]
    left, top = (
        min(max(round(centre - length / 2), 0), whole - length)
        for centre, length, whole in zip(face.centre, lengths, picture, strict=True)
    )
    width, height = (max(1, round(length * scale)) for length in lengths)
    size = (width, height) if wanted.crop is None else wanted.crop
    return Cut(quarters, angle, face.centre, (left, top, left + lengths[0], top + lengths[1]), size)


def render(pixels: np.ndarray, cut: Cut) -> np.ndarray:
    """The written picture. Where a turned picture has nothing, its edge goes on."""
    turned = np.ascontiguousarray(np.rot90(pixels, cut.quarters))
    left, top, right, bottom = cut.window
    if cut.angle:
        # to OpenCV the first pixel's middle is 0
        matrix = cv2.getRotationMatrix2D((cut.pivot[0] - 0.5, cut.pivot[1] - 0.5), cut.angle, 1.0)
        matrix[:, 2] -= (left, top)
        size = (right - left, bottom - top)
        part = cv2.warpAffine(turned, matrix, size, flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    else:
        part = turned[top:bottom, left:right]
    return resize(part, cut.size)


def moved(picture: Size, face: Detected, cut: Cut) -> Detected:
    """The face as it lies in the written picture; as far as its box reaches beyond the edges, that is cut off.

    The new size is that of the box around the turned ellipse that fills the old box.
    """
    _, face = _turned(picture, face, cut.quarters)
    left, top, right, bottom = cut.window
    scales = cut.size[0] / (right - left), cut.size[1] / (bottom - top)
    turn = math.radians(cut.angle)
    cosine, sine = math.cos(turn), math.sin(turn)

    def place(point: Place) -> Place:
        x, y = point[0] - cut.pivot[0], point[1] - cut.pivot[1]
        x, y = cosine * x + sine * y + cut.pivot[0], cosine * y - sine * x + cut.pivot[1]
        return (x - left) * scales[0], (y - top) * scales[1]

    centre = place(face.centre)
    size = tuple(side * scale for side, scale in zip(_turned_size(face.size, cut.angle), scales, strict=True))
    box = replace(face, centre=centre, size=size, marks=tuple(map(place, face.marks)))
    return clipped(box, cut.size)


def clipped(face: Detected, picture: Size) -> Detected:
    """The face with that part of its box that lies in the picture."""
    centre, size = [], []
    for middle, extent, length in zip(face.centre, face.size, picture, strict=True):
        start, end = (min(max(middle + half, 0), length) for half in (-extent / 2, extent / 2))
        centre.append((start + end) / 2)
        size.append(end - start)
    return replace(face, centre=tuple(centre), size=tuple(size))


def in_whole_pixels(face: Detected) -> Face:
    """The face as names of files tell of it."""
    width, height = (max(1, round(side)) for side in face.size)
    return Face((int(face.centre[0]), int(face.centre[1])), (width, height))


def _turned(picture: Size, face: Detected, quarters: int) -> tuple[Size, Detected]:
    """A picture's size and a face in it after so many quarters of a turn anticlockwise."""
    for _ in range(quarters % 4):
        width = picture[0]
        centre, *marks = ((y, width - x) for x, y in (face.centre, *face.marks))
        face = replace(face, centre=centre, size=face.size[::-1], marks=tuple(marks))
        picture = picture[::-1]
    return picture, face


def _turned_size(size: tuple[float, float], degrees: float) -> tuple[float, float]:
    """The box around an ellipse in a box of this size, turned by an angle."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = size
    return math.hypot(width * cosine, height * sine), math.hypot(width * sine, height * cosine)
