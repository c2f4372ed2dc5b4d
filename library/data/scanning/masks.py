"""Which mask belongs to which image, and whether it can be meant for it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.console import warn
from library.data.buckets import Size
from library.data.config import SubsetConfig
from library.data.images import BrokenImage
from library.data.scanning.columns import Texts
from library.data.scanning.listing import list_folder, normalised
from library.data.scanning.reading import in_chunks, read_header
from library.data.scanning.wording import counted
from library.errors import some

_FILES_KEPT = 20  # names for the dataset sheet: there may be as many as images


@dataclass(frozen=True)
class Masks:
    """The masks of a subset's N images."""

    names: Texts
    """(N,) file names in the folder of masks, empty where an image has none"""
    found: int = 0
    missing: int = 0
    """Images without a mask, where there is a folder of masks."""
    stray: int = 0
    """Masks without an image."""
    wrong_size: int = 0
    """Masks of other proportions than their images."""
    wrong_names: tuple[str, ...] = ()
    """Names of the first of them."""


def find_masks(names: list[str], sizes: np.ndarray, subset: SubsetConfig) -> Masks:
    """The masks of the images of these names and sizes (N, 2); what looks wrong with them is said.

    Of the masks only the headers are read. Those that cannot be read are left for whoever decodes them.
    """
    folder = subset.conditioning_data_dir
    count = len(names)
    nothing = Texts(b"", np.zeros(count, np.int64), np.zeros(count, np.int32))
    if folder is None or not names:
        return Masks(nothing)
    try:
        listing = list_folder(folder)
    except OSError as problem:
        warn(f"{folder}: the masks cannot be read and are not used ({problem.strerror})")
        return Masks(nothing, missing=count)
    masks = [listing.find(Path(name).stem) or "" for name in names]
    missing = [name for name, mask in zip(names, masks, strict=True) if not mask]
    stems = {normalised(Path(name).stem) for name in names}
    stray = [mask for mask, stem in zip(listing.images, listing.stems, strict=True) if normalised(stem) not in stems]
    wrong = _of_other_proportions(os.fspath(folder), masks, sizes, subset.images.legacy_image_decode)
    if missing:
        have = "has" if len(missing) == 1 else "have"
        warn(f"{folder}: {len(missing)} of {count} images of {subset.name} {have} no mask: {some(missing)}")
    if stray:
        have_none = counted(len(stray), "mask has no image", "masks have no image")
        warn(f"{folder}: {have_none} in {subset.name}: {some(stray)}")
    if wrong:
        differ = counted(
            len(wrong),
            "mask has other proportions than its image and is distorted to its size",
            "masks have other proportions than their images and are distorted to their sizes",
        )
        named = some([f"{mask} ({w}x{h}, the image {iw}x{ih})" for mask, (w, h), (iw, ih) in wrong])
        warn(f"{folder}: {differ}: {named}")
    return Masks(
        names=Texts.of(masks),
        found=count - len(missing),
        missing=len(missing),
        stray=len(stray),
        wrong_size=len(wrong),
        wrong_names=tuple(mask for mask, _, _ in wrong[:_FILES_KEPT]),
    )


def _of_other_proportions(
    folder: str, masks: list[str], sizes: np.ndarray, legacy: bool
) -> list[tuple[str, Size, Size]]:
    """(name, its size, the image's size) of the masks that are no smaller or larger copies of their image's shape."""

    def read(rows: Sequence[int]) -> list[tuple[str, Size, Size]]:
        wrong = []
        for row in rows:
            try:
                size, _ = read_header(os.path.join(folder, masks[row]), legacy=legacy)
            except BrokenImage:
                continue
            image = tuple(sizes[row].tolist())
            if not _same_proportions(size, image):
                wrong.append((masks[row], size, image))
        return wrong

    with_mask = [row for row, mask in enumerate(masks) if mask]
    return [wrong for some_wrong in in_chunks(read, with_mask) for wrong in some_wrong]


def _same_proportions(one: Size, other: Size) -> bool:
    """Whether one is the other resized, with sides that were rounded to within a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(sum(one), sum(other))
