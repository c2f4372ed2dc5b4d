"""From an image file to the pixels of a training example, and the mask of its loss. All on NumPy arrays."""

import os
from dataclasses import dataclass

import numpy as np

from library.data import augment
from library.data.augment import Draws, resize
from library.data.buckets import Geometry, Size
from library.data.decode import BrokenImage, decode, decode_mask, is_animated, read_size

__all__ = [
    "BrokenImage",
    "Example",
    "ImageOptions",
    "example",
    "flip",
    "flips",
    "is_animated",
    "latent_mask",
    "load",
    "load_mask",
    "mask",
    "product",
    "read_size",
    "resize",
    "to_model_range",
    "varies",
]


@dataclass(frozen=True)
class ImageOptions:
    """How a subset's images become training examples. The names are those of the options."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    """Smallest and largest size of the crop, in sizes of the face."""
    resize_interpolation: str | None = None
    """None: area when shrinking, Lanczos when growing."""
    alpha_mask: bool = False
    legacy_image_decode: bool = False
    """Neither orientation, colour profiles nor transparency are looked at."""


@dataclass
class Example:
    """One use of an image, at its place in a batch."""

    image: np.ndarray
    """uint8 RGB (h, w, 3) of the bucket's size"""
    mask: np.ndarray | None
    """float32 (h, w) in 0..1, or None"""
    flipped: bool


def load(path: str | os.PathLike, options: ImageOptions) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB (H, W, 3) and, with `alpha_mask`, alpha (H, W) if the image has any; both uint8. Raises BrokenImage.

    `legacy_image_decode` reads as the older toolkit did; see `decode` for what is done otherwise.
    """
    return decode(path, keep_alpha=options.alpha_mask, legacy=options.legacy_image_decode)


def load_mask(path: str | os.PathLike, *, legacy: bool = False) -> np.ndarray:
    """The red channel of a mask file, float32 (H, W) in 0..1. Raises BrokenImage, which names the file."""
    try:
        return decode_mask(path, legacy=legacy)
    except BrokenImage as problem:
        raise BrokenImage(f"its mask {path}: {problem}") from None


def example(
    path: str | os.PathLike,
    geometry: Geometry,
    options: ImageOptions,
    rng: np.random.Generator | None,
    mask_path: str | os.PathLike = "",
) -> Example:
    """The image in its bucket. With `rng`, a generator not yet used, the options' random changes; None: none of them.

    Its mask is that of the file `mask_path` times its own alpha, if there are such and `alpha_mask` is on; a mask file
    of another size than the image is first resized to it. Raises BrokenImage, also for the mask.
    """
    rgb, alpha = load(path, options)
    size = (rgb.shape[1], rgb.shape[0])
    draws = None if rng is None else Draws.of(rng)
    placement = _placement(path, size, geometry, options, draws)
    image = augment.put(rgb, placement, options.resize_interpolation)
    own = None if alpha is None else augment.put(alpha.astype(np.float32) / 255, placement)
    given = _file_mask(mask_path, size, options, placement) if mask_path else None
    covered = product(given, own)
    flipped = draws is not None and _flips(options, draws)
    if draws is not None and options.color_aug:
        image = augment.vary_colours(image, draws)
    if flipped:
        image, covered = flip(image), None if covered is None else flip(covered)
    return Example(image, covered, flipped)


def varies(options: ImageOptions) -> str | None:
    """The first option by which an image changes from use to use, or None. Mirroring, of two outcomes, is none."""
    names = ("color_aug", "random_crop", "face_crop_aug_range")
    return next((name for name in names if getattr(options, name)), None)


def flips(options: ImageOptions, rng: np.random.Generator) -> bool:
    """Whether `example` would mirror the image with this generator."""
    return _flips(options, Draws.of(rng))


def mask(path: str | os.PathLike, geometry: Geometry, size: Size, options: ImageOptions) -> np.ndarray:
    """The mask of an image of this size from a mask file, as `example` would give it without anything random."""
    return _file_mask(path, size, options, augment.whole(size, geometry))


def product(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Two masks of one size as one; None is no mask."""
    if first is None or second is None:
        return second if first is None else first
    return first * second


def flip(pixels: np.ndarray) -> np.ndarray:
    """The mirror image, left and right exchanged."""
    return pixels[:, ::-1]


def to_model_range(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W) in -1..1."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1.0


def latent_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask (H, W) averaged over the areas of latents, which are `size` = (width, height); float32 (h, w)."""
    return resize(np.ascontiguousarray(mask, dtype=np.float32), size, "area")


def _placement(
    path: str | os.PathLike, size: Size, geometry: Geometry, options: ImageOptions, draws: Draws | None
) -> augment.Placement:
    sizes = options.face_crop_aug_range
    face = augment.face_in(os.path.basename(path)) if sizes and draws else None
    if face is not None:
        return augment.around_face(size, geometry.bucket, face, sizes, draws, displaced=options.random_crop)
    return augment.whole(size, geometry, draws if options.random_crop else None)


def _file_mask(path: str | os.PathLike, size: Size, options: ImageOptions, placement: augment.Placement) -> np.ndarray:
    return augment.put(resize(load_mask(path, legacy=options.legacy_image_decode), size), placement)


def _flips(options: ImageOptions, draws: Draws) -> bool:
    return options.flip_aug and draws.flip < 0.5
