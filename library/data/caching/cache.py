"""Latents computed once, before training, and how loader processes read them.

They lie in files beside the images, for later runs and other programs, or in a temporary memory-mapped file.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.bars import progress_bar
from library.console import rank, warn
from library.data import images
from library.data.buckets import Size
from library.data.caching import latents_file
from library.data.caching.latents_file import FLIPPED, LATENTS, MASK, LatentsLayout, Recipe, State
from library.data.caching.latents_plan import LatentsPlan
from library.data.caching.npz import Arrays
from library.data.caching.prefetch import THREADS, Picture, decoded
from library.data.records import NOTHING_DECODES, Record
from library.data.scanning.scan import printable
from library.data.scratch import ScratchFolder
from library.errors import UserError
from library.randomness import address

Encode = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Images (B, 3, H, W) in -1..1 on the CPU, a seed for each one's posterior draw -> unscaled latents (B, C, h, w)."""

_NOWHERE, _BESIDE_IMAGE = -1, -2  # in place of an offset
_KEPT = (LATENTS, FLIPPED, MASK)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class LatentsCache:
    """Unscaled latents by record, mirrored ones too where the subset asks for mirroring. Pickled as its path."""

    def __init__(self, folder: Path, scratch: ScratchFolder | None = None):
        self.folder = folder
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        values = folder / "latents.bin"
        # an empty file cannot be mapped
        self._values = np.memmap(values, np.float32, "r") if values.stat().st_size else np.zeros(0, np.float32)
        facts = json.loads((folder / "facts.json").read_text())
        self._layout = LatentsLayout(**facts["layout"])
        self.left_out: int = facts["left_out"]
        """How many images could not be decoded."""
        self._scratch = scratch  # the last attribute is the last to go, after the maps of what is in the folder

    def __reduce__(self):
        return LatentsCache, (self.folder,)

    def shape(self, bucket: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a bucket (width, height in pixels)."""
        return self._layout.shape(bucket)

    def latents(self, record: Record, flipped: bool) -> torch.Tensor | None:
        """Unscaled latents (C, h, w) float32, a copy; None for an image that could not be decoded.

        Raises BrokenImage if its file of latents is damaged.
        """
        values = self._read(record, FLIPPED if flipped else LATENTS, self.shape(record.bucket))
        return None if values is None else torch.from_numpy(values)

    def alpha_mask(self, record: Record) -> np.ndarray | None:
        """The image's own alpha (H, W) float32 in pixels of the bucket, not mirrored; None where it is not asked for.

        Raises BrokenImage if its file of latents is damaged.
        """
        return self._read(record, MASK, record.bucket[::-1])

    def _read(self, record: Record, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        start = int(self._offsets[record.index, _KEPT.index(name)])
        if start >= 0:
            return self._values[start : start + int(np.prod(shape))].reshape(shape).copy()
        if start == _NOWHERE:
            return None
        values = latents_file.read(record, self._layout, name)
        if values is None:
            raise images.BrokenImage(f"no {name} of its size can be read from the cache, make it again")
        if not np.isfinite(values).all():
            raise images.BrokenImage(f"its {name} in the cache are not finite, make them again with --no_half_vae")
        return values


def make_latents(
    plan: LatentsPlan,
    encode: Encode | None,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> LatentsCache:
    """Encodes what is missing, in groups of up to `batch_size` of one bucket that depend on the table alone.

    `encode` may be None if nothing is missing. To the disk each of `world` processes makes its share and calls `wait`,
    which returns when all have. An image that does not decode is left out with a warning. Raises UserError if latents
    are not finite, no image is left, a disk is full, or a folder that several processes share cannot be written to.
    """
    shared = plan.to_disk and world > 1
    with _Store(plan) as store:
        share = (rank, world, ~plan.elsewhere) if shared else (0, 1, np.ones_like(plan.elsewhere))
        for recipe, arrays, source in _encoded(plan, encode, batch_size, *share):
            index = recipe.record.index
            if plan.to_disk and not plan.elsewhere[index] and _write(recipe, arrays, source, needed=shared):
                plan.states[index] = State.VALID
            else:
                store.add(recipe, arrays)
        if shared:  # what goes to the store is each process's own
            for recipe, arrays, _ in _encoded(plan, encode, batch_size, 0, 1, plan.elsewhere):
                store.add(recipe, arrays)
    if shared:
        wait()
        store.take_files_of_others()
    return store.finish()


@dataclass(frozen=True)
class Outcome:
    """What became of one process's share of the images."""

    written: int
    valid: int
    failed: list[str]
    """Paths of the images that do not decode."""


def write_latents(
    plan: LatentsPlan,
    encode: Encode | None,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    threads: int = THREADS,
    note: Callable[[Recipe], None] = lambda recipe: None,
) -> Outcome:
    """Makes the files that are missing, of this process's share; the processes need not know of each other.

    `encode` may be None if nothing is missing. An image that does not decode is left out with a warning. What is made
    `elsewhere` is not its concern. `threads` decode, and `note` is told of each file when it is there. Raises UserError
    if latents are not finite, a disk is full or a folder cannot be written to.
    """
    written = 0
    for recipe, arrays, source in _encoded(plan, encode, batch_size, rank, world, ~plan.elsewhere, threads):
        _write(recipe, arrays, source, needed=True)
        note(recipe)
        plan.states[recipe.record.index] = State.VALID
        written += 1
    groups = plan.groups(batch_size, rank, world)
    share = [index for group in groups for index in group.tolist() if not plan.elsewhere[index]]
    failed = [plan.table[index].path for index in share if plan.states[index] == State.MISSING]
    return Outcome(written, len(share) - len(failed) - written, failed)


def _write(recipe: Recipe, arrays: Arrays, source: dict[str, Any], *, needed: bool) -> bool:
    """Writes the file of one image. False for a read-only folder, unless it is `needed`."""
    path = Path(recipe.path)
    try:
        latents_file.write(recipe, arrays, source)
    except OSError as problem:
        if problem.errno in _DISK_FULL:
            raise UserError(
                f"{path} cannot be written because the disk is full: free some space and start again, the files that "
                "are finished are used"
            ) from None
        if problem.errno in _READ_ONLY and not needed:
            warn(f"{path.parent} cannot be written to: the latents of its images are kept for this run alone")
            return False
        raise UserError(
            f"{path} cannot be written ({problem.strerror}): make its folder writable, or let training keep latents in "
            "memory, with --cache_latents alone"
        ) from None
    return True


class _Store:
    """The temporary folder that a LatentsCache reads, while it is being filled."""

    def __init__(self, plan: LatentsPlan):
        self._plan = plan
        self._scratch = ScratchFolder("latents")
        self._file = (self._scratch.path / "latents.bin").open("wb")
        self._count = 0  # of numbers written
        self._offsets = np.full((len(plan.table), len(_KEPT)), _NOWHERE, dtype=np.int64)

    def __enter__(self) -> "_Store":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # `add` has said that the disk is full
            self._file.close()

    def add(self, recipe: Recipe, arrays: Arrays) -> None:
        """Keeps the arrays in the temporary file."""
        for name, values in arrays.items():
            try:
                self._file.write(values.tobytes())
                self._file.flush()
            except OSError as problem:
                if problem.errno not in _DISK_FULL:
                    raise
                done, wanted = (np.count_nonzero(column) for column in (self._cached(), self._plan.states))
                raise UserError(
                    f"{self._scratch.path.parent} is full after the latents of {done} of {wanted} images: free some "
                    "space, or set the environment variable TMPDIR to a folder on a larger disk"
                ) from None
            self._offsets[recipe.record.index, _KEPT.index(name)] = self._count
            self._count += values.size

    def take_files_of_others(self) -> None:
        """Finds the files that other processes have made."""
        states = self._plan.states
        for index in np.flatnonzero((states == State.MISSING) & ~self._cached()).tolist():
            recipe = self._plan.recipe(index)
            if not self._plan.elsewhere[index] and latents_file.judge(recipe).state == State.VALID:
                states[index] = State.VALID
            else:
                warn(_left_out(recipe, "there are no latents of it"))

    def finish(self) -> LatentsCache:
        """The cache to read from."""
        plan, cached = self._plan, self._cached()
        sought = plan.table.training(plan.datasets) & (plan.states != State.UNUSED)
        if sought.any() and not cached[sought].any():
            raise UserError(NOTHING_DECODES)
        self._offsets[plan.states >= State.VALID] = _BESIDE_IMAGE
        np.save(self._scratch.path / "offsets.npy", self._offsets)
        left_out = int(np.count_nonzero(plan.states) - np.count_nonzero(cached))
        facts = {"layout": asdict(plan.layout), "left_out": left_out}
        (self._scratch.path / "facts.json").write_text(json.dumps(facts))
        return LatentsCache(self._scratch.path, self._scratch)

    def _cached(self) -> np.ndarray:
        """(N,) whether there are latents, here or in a file beside the image."""
        return (self._plan.states >= State.VALID) | (self._offsets[:, 0] != _NOWHERE)


def _encoded(
    plan: LatentsPlan,
    encode: Encode | None,
    batch_size: int,
    share: int,
    world: int,
    wanted: np.ndarray,
    threads: int = THREADS,
) -> Iterator[tuple[Recipe, Arrays, dict[str, Any]]]:
    """(recipe, arrays, what the image file was like) of each missing image of a process's share that decodes.

    Only of those that are `wanted` (N,), though whole groups are encoded.
    """

    def groups() -> Iterator[np.ndarray]:
        missing = wanted & (plan.states == State.MISSING)
        return (group for group in plan.groups(batch_size, share, world) if missing[group].any())

    total = sum(map(len, groups()))
    with progress_bar(total=total, desc="caching latents", unit="img", disable=rank() > 0 or not total) as bar:
        for pictures in decoded(([plan.recipe(index) for index in group.tolist()] for group in groups()), threads):
            missing = [p for p in pictures if wanted[p.recipe.record.index] and _is_missing(plan, p.recipe)]
            for picture in missing:
                if picture.problem:
                    warn(_left_out(picture.recipe, picture.problem))
            missing = [picture for picture in missing if not picture.problem]
            if missing:
                latents = _encode(encode, pictures, flipped=False)
                mirrored = _encode(encode, [p for p in pictures if p.recipe.options.flip_aug], flipped=True)
            for picture in missing:
                index = picture.recipe.record.index
                arrays = {LATENTS: latents[index], FLIPPED: mirrored.get(index), MASK: _mask(picture)}
                yield picture.recipe, {name: arrays[name] for name in picture.recipe.names}, picture.source
            bar.update(len(pictures))


def _is_missing(plan: LatentsPlan, recipe: Recipe) -> bool:
    """Whether it still is: the same image in another dataset may have given the file in the meantime."""
    index = recipe.record.index
    if plan.states[index] != State.MISSING:
        return False
    looked_for = plan.to_disk and not plan.anew and not plan.elsewhere[index]
    if looked_for and latents_file.judge(recipe).state == State.VALID:
        plan.states[index] = State.VALID
    return plan.states[index] == State.MISSING


def _left_out(recipe: Recipe, problem: str) -> str:
    return f"{recipe.record.path} cannot be decoded and is left out: {problem}"


def _mask(picture: Picture) -> np.ndarray:
    """Own alpha (H, W), float32; of an opaque image too, so that a file shows that it was looked for."""
    return np.ones(picture.image.shape[:2], np.float32) if picture.mask is None else picture.mask


def _encode(encode: Encode, pictures: list[Picture], *, flipped: bool) -> dict[int, np.ndarray]:
    """Latents (C, h, w) by record of the pictures, all of one size, that decode. Raises UserError if not finite."""
    if not pictures:
        return {}
    pixels = [images.flip(picture.image) if flipped else picture.image for picture in pictures]
    batch = torch.from_numpy(np.stack([images.to_model_range(image) for image in pixels]))
    latents = encode(batch, [_seed(picture.recipe, flipped) for picture in pictures]).detach().float().cpu().numpy()
    made = {}
    for picture, values in zip(pictures, latents, strict=True):
        if picture.problem:
            continue
        record = picture.recipe.record
        if not np.isfinite(values).all():
            raise UserError(f"{record.path}: the VAE's latents for this image are not finite: use --no_half_vae")
        made[record.index] = values
    return made


def _seed(recipe: Recipe, flipped: bool) -> int:
    """Where the posterior draw of an image is addressed: the same in whichever dataset and run it is cached."""
    folder, name = os.path.split(os.path.abspath(recipe.record.path))
    place = printable(os.path.basename(folder)), printable(name)
    return address("vae", *place, *recipe.geometry.bucket, "flipped" if flipped else "")
