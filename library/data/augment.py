"""How the pixels of an image become those of its bucket: window, resize, crop, mirror, colours. Pure functions.

Sizes are (width, height) in pixels; images uint8 (H, W, 3), masks float32 (H, W).
"""

import re
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from library.data.buckets import Geometry, Size

# One image is little work for several threads, and OpenCV's own do not survive the forking of loader processes.
cv2.setNumThreads(1)

# Pillow's kernels grow with the reduction, so that these average too when shrinking; OpenCV's would skip pixels.
_KERNELS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
_FACE = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)\.[^.]*$")
_HUE = 10.0  # degrees
_SATURATION = _BRIGHTNESS = _GAMMA = 0.05


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one use of an image, each in [0, 1). All are drawn, whatever options want them, so that no
    option changes what another one draws.
    """

    flip: float
    left: float
    top: float
    face: float
    hue: float
    saturation: float
    brightness: float
    gamma: float

    @classmethod
    def of(cls, rng: np.random.Generator) -> "Draws":
        return cls(*rng.random(8).tolist())


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image and its masks get into the bucket: `window` is cut out, resized, and the bucket cut out of that."""

    window: tuple[int, int, int, int]
    """Left, top, right, bottom in the image."""
    resized: Size
    offset: Size
    """Left and top of the bucket in the resized window."""
    bucket: Size


@dataclass(frozen=True, slots=True)
class Face:
    """Where a face is, in pixels of the image."""

    centre: tuple[int, int]
    size: Size


def face_in(name: str) -> Face | None:
    """The face that a file name tells of: `<anything>_<centre x>_<centre y>_<width>_<height>.<extension>`."""
    found = _FACE.search(name)
    if found is None:
        return None
    x, y, width, height = map(int, found.groups())
    return Face((x, y), (width, height)) if width and height else None


def whole(image: Size, geometry: Geometry, draws: Draws | None = None) -> Placement:
    """The whole image resized; the bucket is in its middle, or with `draws` anywhere in it."""
    room = [resized - bucket for resized, bucket in zip(geometry.resized, geometry.bucket, strict=True)]
    offset = geometry.offset if draws is None else tuple(map(_anywhere, (0, 0), room, (draws.left, draws.top)))
    return Placement((0, 0, *image), geometry.resized, offset, geometry.bucket)


def around_face(
    image: Size, bucket: Size, face: Face, sizes: tuple[float, float], draws: Draws, *, displaced: bool
) -> Placement:
    """A window of the bucket's aspect around a face, as far as it fits into the image.

    Its shorter side is the larger one of the face times a factor drawn from `sizes`. The face is in its middle; when
    `displaced`, anywhere in it (or where it is the smaller of the two, it is anywhere in the face).
    """
    factor = sizes[0] + (sizes[1] - sizes[0]) * draws.face
    scale = factor * max(face.size) / min(bucket)
    scale = min(scale, *(length / side for length, side in zip(image, bucket, strict=True)))
    corner, window = [], []
    for length, side, centre, extent, draw in zip(
        image, bucket, face.centre, face.size, (draws.left, draws.top), strict=True
    ):
        size = min(length, max(1, round(side * scale)))
        start = centre - size // 2
        if displaced:
            ends = sorted((centre - extent // 2, centre - extent // 2 + extent - size))
            start = _anywhere(*(min(max(end, 0), length - size) for end in ends), draw)
        corner.append(min(max(start, 0), length - size))
        window.append(size)
    left, top = corner
    return Placement((left, top, left + window[0], top + window[1]), bucket, (0, 0), bucket)


def put(pixels: np.ndarray, placement: Placement, interpolation: str | None = None) -> np.ndarray:
    """The bucket's part of an image or a mask of the image's size; see `resize` for `interpolation`."""
    left, top, right, bottom = placement.window
    resized = resize(pixels[top:bottom, left:right], placement.resized, interpolation)
    (left, top), (width, height) = placement.offset, placement.bucket
    return resized[top : top + height, left : left + width]


def resize(pixels: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """Scales to (width, height). Without a name: averaging areas when shrinking, with a Lanczos kernel when growing.

    Masks are averaged over areas, whatever they are told, as numbers beyond 0..1 would make no sense.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if size[0] * size[1] < width * height else "lanczos"
    if pixels.ndim == 3 and interpolation in _KERNELS:
        return np.asarray(Image.fromarray(pixels).resize(size, _KERNELS[interpolation]))
    nearest = pixels.ndim == 3 and interpolation == "nearest"
    return cv2.resize(pixels, size, interpolation=cv2.INTER_NEAREST_EXACT if nearest else cv2.INTER_AREA)


def vary_colours(image: np.ndarray, draws: Draws) -> np.ndarray:
    """The same image (H, W, 3) in slightly other colours.

    Hue is turned by up to 10 degrees, saturation and brightness are multiplied, and brightness is raised to a power, by
    0.95 to 1.05; all evenly distributed.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV))
    hue = (hue + _HUE * (2 * draws.hue - 1)) % 360
    saturation = saturation * _factor(draws.saturation, _SATURATION)
    value = (value * _factor(draws.brightness, _BRIGHTNESS)) ** _factor(draws.gamma, _GAMMA)
    changed = cv2.merge([hue, np.minimum(saturation, 1), np.minimum(value, 1)])
    return (cv2.cvtColor(changed, cv2.COLOR_HSV2RGB) * 255).round().astype(np.uint8)


def _factor(draw: float, spread: float) -> float:
    return 1 + spread * (2 * draw - 1)


def _anywhere(first: int, last: int, draw: float) -> int:
    """A whole number from `first` to `last`, both possible."""
    return first + int(draw * (last - first + 1))
