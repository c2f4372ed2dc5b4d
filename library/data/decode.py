"""From an image file to pixels: orientation, modes, colour profiles, transparency. uint8 NumPy arrays."""

import functools
import io
import os
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from library.data.buckets import Size

_ORIENTATION = 0x0112  # EXIF tag; what undoes each of its values:
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = (5, 6, 7, 8)
_ANIMATIONS = ("AVIF", "GIF", "PNG", "WEBP")  # other formats keep thumbnails and second views as further frames
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_NEARLY_SRGB = 2  # how far, of 255, a profile may be from sRGB and still count as sRGB
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


def read_size(path: str | os.PathLike, legacy: bool = False) -> Size:
    """(width, height) as the image is shown, with `legacy` as it is stored; from the file's header alone.

    Raises BrokenImage.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = not legacy and _orientation(image) in _SIDES_SWAPPED
            return (height, width) if turned else (width, height)
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def is_animated(path: str | os.PathLike) -> bool:
    """Whether the file shows several frames, of which only the first is used; from its header. Raises BrokenImage."""
    try:
        with Image.open(path) as image:
            return image.format in _ANIMATIONS and getattr(image, "is_animated", False)
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def decode(path: str | os.PathLike, *, keep_alpha: bool, legacy: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB (H, W, 3) and, with `keep_alpha`, the alpha channel (H, W) if the image has one. Raises BrokenImage.

    The image is turned as its EXIF data says and its colours are converted from its colour profile to sRGB. Transparent
    parts are laid over white; with `keep_alpha` the colours beneath are as they are in the file, also where nothing of
    them shows. `legacy`: neither orientation nor profile is looked at, and transparency only with `keep_alpha`.
    """
    try:
        with Image.open(path) as image:
            if legacy:
                return _plain(image, keep_alpha)
            image = _eight_bits(_upright(image))
            rgb, alpha = _split(image)
            rgb = _to_srgb(rgb, image.info.get("icc_profile"))
            if alpha is None or keep_alpha:
                return np.asarray(rgb), None if alpha is None else np.asarray(alpha)
            return np.asarray(Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)), None
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def decode_mask(path: str | os.PathLike, *, legacy: bool) -> np.ndarray:
    """The red channel of a mask file, float32 (H, W) in 0..1: numbers, so neither profile nor transparency matters.

    It is turned as its EXIF data says, unless `legacy`. Raises BrokenImage.
    """
    try:
        with Image.open(path) as image:
            image = _eight_bits(image if legacy else _upright(image))
            return np.asarray(image.convert("RGB"))[..., 0].astype(np.float32) / 255
    except _DECODER_ERRORS as problem:
        raise BrokenImage(_reason(problem, path)) from None


def _orientation(image: Image.Image) -> int:
    # Asking a PNG without EXIF data for it would decode the whole picture.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))  # looked up before decoding, exactly as read_size does
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image, keep_alpha: bool) -> tuple[np.ndarray, np.ndarray | None]:
    if keep_alpha and image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        return pixels[..., :3], pixels[..., 3]
    return np.asarray(image.convert("RGB")), None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 or 32 bits, or of fractions, scaled to 8 bits: converting would cut off what is above 255."""
    image.load()
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8
    elif image.mode == "I":  # 16 bits in a larger type
        grey = np.asarray(image).clip(0, 0xFFFF) >> 8
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        grey = (values * (255 if values.max() <= 1 else 1)).clip(0, 255).round()
    else:
        return image
    scaled = Image.fromarray(grey.astype(np.uint8))
    scaled.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.uint8(255) * (np.asarray(image) != image.info["transparency"])))
    return scaled


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours, in a mode that a profile may be for (L, RGB or CMYK), and alpha if there is any."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return layer.getchannel("R") if image.mode in ("L", "LA") else layer.convert("RGB"), layer.getchannel("A")
    return image if image.mode in ("L", "CMYK") else image.convert("RGB"), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    modes = ("L", "RGB") if image.mode == "L" else (image.mode,)  # a grey picture may come with a profile of colours
    for mode in modes if profile else ():
        transform = _transform(profile, mode)
        if transform is not None:
            return ImageCms.applyTransform(image.convert(mode), transform)
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a colour profile to sRGB, for images of a mode; None if it is broken, for other images, or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _PROFILE_MODES.get(source.profile.xcolor_space) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if mode == "RGB" and _changes_nothing(transform) else transform
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return np.abs(changed.astype(int) - colours).max() <= _NEARLY_SRGB


def _reason(problem: Exception, path: str | os.PathLike) -> str:
    if isinstance(problem, FileNotFoundError):
        return "it is a link to a file that is not there" if os.path.islink(path) else "it is no longer there"
    if os.path.exists(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(problem, Image.UnidentifiedImageError):
        return "it is not an image in a known format"
    if isinstance(problem, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
    if "truncated" in str(problem):  # Pillow counts in bytes what it has read and cannot use, not what is missing
        return "the file breaks off, so that a part of the picture is missing"
    return getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
