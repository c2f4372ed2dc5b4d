"""From an image file to the pixels of a training example: decode, resize, crop, mirror, scale. All on NumPy arrays."""

import os
import struct
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps

from library.data.buckets import Geometry, Size

# One image is little work for several threads, and OpenCV's own do not survive the forking of loader processes.
cv2.setNumThreads(1)

_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that swap width and height
# What decoders raise on damaged files. Running out of memory is not among it: that is no fault of the image's.
_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenImage(Exception):
    """An image file that cannot be used. The text says why, without the file's name."""


def read_size(path: str | os.PathLike) -> Size:
    """(width, height) as the image is shown, from the file's header alone. Raises BrokenImage."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in _TURNED else (width, height)
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def load(path: str | os.PathLike) -> np.ndarray:
    """The image as shown, uint8 RGB (H, W, 3): turned as its EXIF data says, transparent parts over white.

    Raises BrokenImage.
    """
    try:
        with Image.open(path) as image:
            turned = _orientation(image) != 1  # looked up before decoding, exactly as read_size does
            return np.array(_to_rgb(ImageOps.exif_transpose(image) if turned else image))
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def example(path: str | os.PathLike, geometry: Geometry) -> np.ndarray:
    """The image at its place in a batch, uint8 RGB (H, W, 3) of the bucket's size. Raises BrokenImage."""
    return crop(resize(load(path), geometry.resized), geometry)


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Scales to (width, height): averaging areas when shrinking, with a Lanczos kernel when growing."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    shrinking = size[0] * size[1] < width * height
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LANCZOS4)


def crop(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Cuts the bucket out of the resized image."""
    left, top = geometry.offset
    width, height = geometry.bucket
    return image[top : top + height, left : left + width]


def flip(image: np.ndarray) -> np.ndarray:
    """The mirror image, left and right exchanged."""
    return image[:, ::-1]


def to_model_range(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W) in -1..1."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1.0


def _orientation(image: Image.Image) -> int:
    # Asking a PNG without EXIF data for it would decode the whole picture.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Converting would cut off everything brighter than 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    background = Image.new("RGBA", layer.size, "white")
    background.alpha_composite(layer)
    return background.convert("RGB")


def _reason(problem: Exception, path: str | os.PathLike) -> str:
    if isinstance(problem, FileNotFoundError):
        return "it is no longer there"
    if os.path.exists(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(problem, Image.UnidentifiedImageError):
        return "it is not an image in a known format"
    return getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
