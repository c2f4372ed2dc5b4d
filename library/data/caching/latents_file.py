"""The latents of one image in a file beside it: what the arrays are called, and whether they are what a run needs.

`<image>_<width>x<height>_sd.npz` holds `latents`, `original_size`, `crop_ltrb`, maybe `latents_flipped`, `alpha_mask`.
The first resolution an image is trained at has these names, at further ones `_<latent height>x<latent width>` is added
to each. `made_from` is ours: JSON as UTF-8 bytes that says what the latents were computed from.
"""

import enum
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from library.data.buckets import Geometry, Size
from library.data.caching.npz import Arrays, read_arrays, read_headers, update_arrays
from library.data.images import ImageOptions
from library.data.records import Record

LATENTS, FLIPPED, MASK = "latents", "latents_flipped", "alpha_mask"
_SIZE, _CROP, _MADE_FROM = "original_size", "crop_ltrb", "made_from"
_NAMES = (LATENTS, FLIPPED, MASK, _SIZE, _CROP, _MADE_FROM)
_OF_ANOTHER_IMAGE = "are of an image that has changed since"
_AMBIGUOUS = "do not tell of which of several images with one name they are"
_PLACING = ("resized", "crop")
_UNNAMED = "arr_0"  # in files of long ago
_RESOLUTION = re.compile(rf"(?:{'|'.join(sorted(_NAMES, key=len, reverse=True))})((?:_\d+x\d+)?)")


@dataclass(frozen=True)
class LatentsLayout:
    """What a family's latents look like, and where they are kept."""

    suffix: str
    """End of the files' names, as `_sd.npz`."""
    channels: int
    factor: int
    """Pixels per latent, each way."""
    fingerprint: str
    """Of the autoencoder's weights."""
    by_stem: bool = False
    """Whether files are called `<image>.npz`, which says no size: they are for the one that metadata names."""

    def shape(self, bucket: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a bucket (width, height in pixels)."""
        return self.channels, bucket[1] // self.factor, bucket[0] // self.factor


class State(enum.IntEnum):
    """What a run finds of an image's latents."""

    UNUSED = 0  # nobody asks for them
    MISSING = 1  # there are none, or they are damaged or stale, or of another autoencoder
    VALID = 2
    UNKNOWN = 3  # they fit and are newer than the image, but do not tell what they were made from


class Finding(NamedTuple):
    """What `judge` says."""

    state: State
    flaw: str = ""
    """What is wrong with a file that does not count, as the end of a sentence about latents."""
    source: dict[str, Any] | None = None
    """The image's `describe_source`, for `note_time`, where a valid file has the image's content but another time."""


@dataclass(frozen=True)
class Recipe:
    """How the latents of one record are made."""

    record: Record
    geometry: Geometry
    options: ImageOptions
    layout: LatentsLayout
    prescribed: bool = False
    """Whether its bucket is the train_resolution of a metadata file."""

    @property
    def path(self) -> str:
        """Where they are written."""
        return file_path(self.record, self.layout)

    @property
    def names(self) -> list[str]:
        """The arrays of numbers that the run needs."""
        return [LATENTS, *([FLIPPED] if self.options.flip_aug else []), *([MASK] if self.options.alpha_mask else [])]

    def facts(self) -> dict[str, Any]:
        """All that makes a difference to the latents besides the image file itself."""
        return {
            "vae": self.layout.fingerprint,
            "bucket": list(self.geometry.bucket),
            "resized": list(self.geometry.resized),
            "crop": list(self.geometry.offset),
            "mask": MASK if self.options.alpha_mask else "",
            "resize_interpolation": self.options.resize_interpolation or "",
            "legacy_image_decode": self.options.legacy_image_decode,
        }


def file_path(record: Record, layout: LatentsLayout) -> str:
    """Where the latents of a record are kept."""
    size = "" if layout.by_stem else f"_{record.width:04d}x{record.height:04d}"
    return f"{record.cache_stem}{size}{layout.suffix}"


def read(record: Record, layout: LatentsLayout, name: str) -> np.ndarray | None:
    """LATENTS or FLIPPED (C, h, w), or MASK (H, W) of the bucket's pixels, float32; None where no file has them."""
    _, arrays = _entry(record, layout, [name])
    return arrays[name].astype(np.float32, copy=False) if arrays else None


def exists(recipe: Recipe) -> bool:
    """Whether there is a file with all that the recipe asks for, by its names and sizes. Reads no numbers."""
    names = [*recipe.names, _MADE_FROM]
    _, entry = _entry(recipe.record, recipe.layout, names, read_headers)
    return entry.keys() >= set(names if _is_ambiguous(recipe.record) else recipe.names)


def judge(recipe: Recipe) -> Finding:
    """Whether the latents on the disk are those of the recipe. Reads all of them."""
    record = recipe.record
    path, entry = _entry(record, recipe.layout, [*recipe.names, _SIZE, _MADE_FROM])
    if not entry:
        damaged = any(os.path.exists(place) and read_arrays(place) is None for place in _places(record, recipe.layout))
        return Finding(State.MISSING, "are damaged" if damaged else "")
    if not all(name in entry for name in recipe.names):
        return Finding(State.MISSING, "lack the mirrored image or the alpha mask")
    if not all(_is_sound(entry[name]) for name in recipe.names):
        return Finding(State.MISSING, "are damaged")
    if _MADE_FROM in entry:
        made_from = _parse(entry[_MADE_FROM])
        source = _source_now(made_from, record.path)
        # how the image got to a size that is prescribed is for the tool that prescribed it, unless a mask goes along
        prepared = recipe.prescribed and path != recipe.path and not record.mask
        flaw = _OF_ANOTHER_IMAGE if source is None else _difference(made_from, recipe, _PLACING if prepared else ())
        if flaw:
            return Finding(State.MISSING, flaw)
        moved = path == recipe.path and source != made_from.get("source", {})
        return Finding(State.VALID, source=source if moved else None)
    if _SIZE in entry and entry[_SIZE].tolist() != [record.width, record.height]:
        return Finding(State.MISSING, _OF_ANOTHER_IMAGE)
    if _is_ambiguous(record):
        return Finding(State.MISSING, _AMBIGUOUS)
    newer = _is_newer(path, record.path)
    return Finding(State.UNKNOWN) if newer else Finding(State.MISSING, _OF_ANOTHER_IMAGE)


def write(recipe: Recipe, arrays: Arrays, source: dict[str, Any]) -> None:
    """Puts LATENTS and what else the recipe asks for into the record's file; other resolutions in it stay, unless the
    image has changed since or the file is for one alone. `source` is the image's `describe_source` when it was read.

    Raises OSError.
    """
    entry = {
        **arrays,
        _SIZE: np.array([recipe.record.width, recipe.record.height]),
        _CROP: np.array(recipe.geometry.crop_ltrb, dtype=np.float32),
        _MADE_FROM: _as_array(recipe.facts() | {"flip": FLIPPED in arrays, "source": source}),
    }

    def merged() -> Arrays:
        others = {} if recipe.layout.by_stem else _other_resolutions(recipe)
        shape = recipe.layout.shape(recipe.record.bucket)
        ending = _ending(shape) if LATENTS in others else ""
        return dict(sorted((others | {f"{name}{ending}": array for name, array in entry.items()}).items()))

    update_arrays(recipe.path, merged)


def describe_source(path: str) -> dict[str, Any]:
    """What tells an image file from a later one of the same name. Raises OSError."""
    facts = os.stat(path)
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "digest": _digest(path)}


def note_time(recipe: Recipe, source: dict[str, Any]) -> None:
    """Puts the time of an image into its file, at each resolution made from this content: the next look at the file
    need not read the image again. Raises OSError.
    """

    def noted() -> Arrays:
        arrays = read_arrays(recipe.path)
        if arrays is None:
            raise FileNotFoundError(recipe.path)
        for name in [name for name in arrays if name.startswith(_MADE_FROM)]:
            made_from = _parse(arrays[name])
            if _content(made_from.get("source", {})) == _content(source):
                arrays[name] = _as_array(made_from | {"source": source})
        return arrays

    update_arrays(recipe.path, noted)


def _content(source: dict[str, Any]) -> tuple[Any, Any]:
    return source.get("size"), source.get("digest")


def _is_ambiguous(record: Record) -> bool:
    """Whether a file that does not tell what it was made from may as well be of another image."""
    return record.shared_stem


def _places(record: Record, layout: LatentsLayout) -> tuple[str, ...]:
    """The files that may hold a record's latents, the better one first."""
    return tuple(dict.fromkeys((file_path(record, layout), f"{record.cache_stem}.npz")))


def _ending(shape: tuple[int, int, int]) -> str:
    return f"_{shape[1]}x{shape[2]}"


def _entry(
    record: Record,
    layout: LatentsLayout,
    names: Sequence[str],
    read: Callable[..., dict[str, Any] | None] = read_arrays,
) -> tuple[str, dict[str, Any]]:
    """The arrays of `names` at the record's resolution, from the first file that has the first of them, and its path.

    Empty where none has. With `read_headers`, the headers.
    """
    shape = layout.shape(record.bucket)
    sizes = {LATENTS: shape, FLIPPED: shape, MASK: record.bucket[::-1]}
    ending = _ending(shape)
    for path in _places(record, layout):
        arrays = read(path, {*names, *(name + ending for name in names), _UNNAMED}) or {}
        if _UNNAMED in arrays:
            mirrored = read(f"{record.cache_stem}_flip.npz", [_UNNAMED]) if FLIPPED in names else None
            arrays = {LATENTS: arrays[_UNNAMED]} | ({FLIPPED: mirrored[_UNNAMED]} if mirrored else {})
        used = ending if names[0] + ending in arrays else ""
        entry = {name: arrays[name + used] for name in names if name + used in arrays}
        if names[0] in entry and all(entry[name].shape == sizes.get(name, entry[name].shape) for name in entry):
            return path, entry
    return "", {}


def _other_resolutions(recipe: Recipe) -> Arrays:
    """What a record's file holds besides the arrays that are about to be written, as far as it is of today's image."""
    arrays = read_arrays(recipe.path) or {}
    shape = recipe.layout.shape(recipe.record.bucket)
    endings = {match[1] for name in arrays if (match := _RESOLUTION.fullmatch(name))}
    for ending in endings:
        latents, made_from = arrays.get(LATENTS + ending), arrays.get(_MADE_FROM + ending)
        if latents is None or latents.shape == shape:
            stale = True
        elif made_from is None:
            stale = _is_ambiguous(recipe.record) or not _is_newer(recipe.path, recipe.record.path)
        else:
            stale = _source_now(_parse(made_from), recipe.record.path) is None
        if stale:
            for name in _NAMES:
                arrays.pop(name + ending, None)
    return arrays


def _is_sound(array: np.ndarray) -> bool:
    """Whether all of an array's numbers are finite."""
    return array.dtype.kind == "f" and bool(np.isfinite(array).all())


def _difference(made_from: dict[str, Any], recipe: Recipe, free: Sequence[str]) -> str:
    """What latents were made with that the recipe does not say, or nothing. What is `free` may differ."""
    facts = recipe.facts().items()
    wrong = [name for name, value in facts if name not in free and made_from.get(name) != value]
    if wrong:
        return "are of another VAE" if wrong == ["vae"] else "were made with other settings"
    return ""


def _is_newer(path: str, image: str) -> bool:
    """Whether a file is from after the image; of an image that is gone, it is."""
    try:
        return os.stat(path).st_mtime_ns >= os.stat(image).st_mtime_ns
    except FileNotFoundError:
        return True


def _source_now(made_from: dict[str, Any], image: str) -> dict[str, Any] | None:
    """The recorded source, with today's time if the image is a copy with another one; None if it is another image.

    What is gone counts as it was, for lack of a better.
    """
    source = made_from.get("source", {})
    try:
        facts = os.stat(image)
        if facts.st_size != source.get("size"):
            return None
        if facts.st_mtime_ns == source.get("mtime_ns"):
            return source
        return source | {"mtime_ns": facts.st_mtime_ns} if _digest(image) == source.get("digest") else None
    except OSError as problem:
        return source if isinstance(problem, FileNotFoundError) else None


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _as_array(made_from: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(made_from, sort_keys=True).encode(), dtype=np.uint8)


def _parse(made_from: np.ndarray) -> dict[str, Any]:
    try:
        facts = json.loads(made_from.tobytes())
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
