"""Smaller versions of the pictures of a folder, beside copies of all that is in it.

A version is named after the resolution whose area it has, `<stem>+<W>x<H>`, whatever its own size. Sizes are (width,
height) in pixels.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from library.console import notice, warn
from library.data.augment import resize
from library.data.buckets import Size
from library.data.decode import decode, read_size
from library.data.scanning.files import file_names, is_image
from library.data.scanning.wording import counted
from library.preprocessing.pictures import find_pictures
from library.preprocessing.results import (
    Again,
    copy_file,
    is_done,
    is_newer,
    own_stems,
    remove_leftovers,
    save_picture,
    state_of,
)
from library.preprocessing.tally import Tally, prepared
from library.tool_files import check_writable

# By their names here, those of the kernels: Lanczos with 3 lobes, and a box is what area averages over.
_KERNELS = {None: "area", "box": "area", "lanczos4": "lanczos"}
_JOURNAL = ".resize_images_to_resolution.unfinished"
_LATENTS = ".npz"  # cached latents, which belong to one size
_VERSION = re.compile(r"(.+)\+\d+x\d+\..+")
_FULL = np.float32(255)


@dataclass(frozen=True)
class Versions:
    """Which smaller versions pictures get, and how these are made."""

    resolutions: tuple[Size, ...]
    divisible_by: int = 1
    interpolation: str | None = None
    as_png: bool = False
    with_associated: bool = False

    def of(self, size: Size) -> list[Size]:
        """The resolutions that a picture of this size is larger than, by area."""
        return [resolution for resolution in self.resolutions if math.prod(resolution) < math.prod(size)]

    @property
    def ending(self) -> str:
        return ".png" if self.as_png else ".jpg"


@dataclass(frozen=True)
class Job:
    """What a file's copy is called and, of a picture, what its versions' names begin with, and what belongs to it."""

    target: Path
    base: str | None = None
    associated: tuple[Path, ...] = ()


def resize_folder(
    source: Path, destination: Path, versions: Versions, *, recursive: bool, force: bool, threads: int
) -> None:
    """Copy the files of a folder to another one and add smaller versions of its pictures; at the end, say how many
    pictures something was written of. With `recursive`, also those of the folders below, in folders of the same names.

    A file that is there, and not older than what it is made of, stays, unless `force` is given. Raises UserError if
    there are no pictures, and for what cannot be written.
    """
    pictures = find_pictures("src_img_folder", source, recursive=recursive)
    jobs = jobs_of(pictures, source, destination)
    check_writable("dst_img_folder", destination / pictures[0].name)
    again = Again(destination / _JOURNAL, source, asdict(versions), force=force)
    maker = _Maker(jobs, versions)
    for folder in {job.target.parent for job in jobs.values()}:
        remove_leftovers(folder, maker.makes)

    def attend(path: Path) -> int:
        written = maker.make(path, anew=again.wants(path))
        again.note(path)
        return written

    with Tally() as tally:
        others = Tally()
        for path, written in prepared(list(jobs), attend, tally, threads=threads, doing="resizing"):
            kind = others if jobs[path].base is None else tally
            kind.written += bool(written)
            kind.skipped += not written
        again.finish()
        if maker.newer:
            files = counted(len(maker.newer), "file is", "files are")
            notice(
                f"{destination}: {files} newer than the original and left as found, as {min(maker.newer)}: --force "
                "makes all again"
            )
        if others.written or others.skipped:
            print(f"other files: {others.written} written, {others.skipped} skipped")
        tally.tell("pictures", "CPU")


def jobs_of(pictures: Iterable[Path], source: Path, destination: Path) -> dict[Path, Job]:
    """What becomes of each picture, and of each file that lies beside one, hidden ones left out."""
    stems = own_stems(pictures)
    folders: dict[Path, list[str]] = {}
    for picture in stems:
        folders.setdefault(picture.parent, []).append(picture.name)
    jobs = {}
    for folder, names in folders.items():
        into = destination / folder.relative_to(source)
        others = sorted(name for name in file_names(folder) if not (is_image(name) or name.startswith(".")))
        belonging = _belonging(names, others)
        for name in names:
            associated = belonging.get(os.path.normcase(Path(name).stem), ())
            jobs[folder / name] = Job(into / name, stems[folder / name], tuple(folder / other for other in associated))
        jobs |= {folder / name: Job(into / name) for name in others}
    return jobs


def _belonging(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """By stems of pictures, the other files that belong to them: the stem, a dot and anything, as in `a.tags.txt`, but
    to the longest of the stems that this is true of.
    """
    stems = {os.path.normcase(os.path.splitext(name)[0]) for name in names}
    found: dict[str, list[str]] = {}
    for other in others:
        if other.endswith(_LATENTS):
            continue
        stem = os.path.normcase(other)
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        if stem:
            found.setdefault(stem, []).append(other)
    return found


def shrunk_size(size: Size, resolution: Size) -> Size:
    """The largest size of the same aspect, as far as whole pixels allow, whose area is not above a resolution's.

    So a dataset without enlarging takes it as it is: one pixel more and it would be shrunk again. Integers alone, as
    roots of floats would miss exact sizes by one pixel.
    """
    area = math.prod(resolution)
    short, long = sorted(size)
    shorter = max(1, math.isqrt(area * short // long))
    longer = min((2 * long * shorter + short) // (2 * short), area // shorter)
    return (longer, shorter) if size[0] > size[1] else (shorter, longer)


def shrink(pixels: np.ndarray, size: Size, interpolation: str | None) -> np.ndarray:
    """Pixels (H, W, 3) or (H, W, 4) at another size. Colours count by how much is seen of them, so that what is
    transparent shows at no edge; where nothing is seen they are kept, as they may be trained on.
    """
    kernel = _KERNELS.get(interpolation, interpolation)
    colours = resize(np.ascontiguousarray(pixels[..., :3]), size, kernel)
    if pixels.shape[2] == 3:
        return colours
    visible = pixels[..., 3:].repeat(3, axis=2)  # as colours, since the room of data treats single channels as masks
    alpha = resize(visible, size, kernel)
    if kernel != "nearest":
        seen = resize(np.rint(pixels[..., :3] * (visible / _FULL)).astype(np.uint8), size, kernel)
        weighted = np.rint(seen * (_FULL / np.maximum(alpha, 1))).clip(0, 255).astype(np.uint8)
        colours = np.where(alpha > 0, weighted, colours)
    return np.dstack([colours, alpha[..., :1]])


def cut(pixels: np.ndarray, divisible_by: int) -> np.ndarray:
    """The middle of an image, of whole multiples."""
    height, width = pixels.shape[:2]
    top, left = height % divisible_by // 2, width % divisible_by // 2
    return pixels[top : top + height - height % divisible_by, left : left + width - width % divisible_by]


class _Maker:
    """Makes what is missing of the files of a plan. Its methods may be called by several threads."""

    def __init__(self, jobs: Mapping[Path, Job], versions: Versions):
        self.jobs = jobs
        self.versions = versions
        self.newer: set[Path] = set()
        self._copies = {os.path.normcase(job.target) for job in jobs.values()}
        self._names = {job.target.name for job in jobs.values()}
        self._bases = {job.base for job in jobs.values()}

    def makes(self, name: str) -> bool:
        """Whether one of the files may be of this name."""
        version = _VERSION.fullmatch(name)
        return name in self._names or (version is not None and version[1] in self._bases)

    def make(self, path: Path, anew: bool) -> int:
        """Of one file all that is not done, or all of it; how many files were written. Raises BrokenImage."""
        job = self.jobs[path]
        if job.base is None:
            return self._copy(path, job.target, anew)
        state, size, written = state_of(path), read_size(path), 0
        stems: dict[str, Size] = {}
        for resolution in self.versions.of(size):
            smaller = shrunk_size(size, resolution)
            if self._can_be_cut(path, smaller):
                stems[job.base + "+{}x{}".format(*resolution)] = smaller
        targets = {job.target.with_name(stem + self.versions.ending): smaller for stem, smaller in stems.items()}
        missing = [target for target in targets if self._is_free(target) and (anew or not self._is_done(target, state))]
        if missing or anew or not self._is_done(job.target, state):
            pixels = _pixels(path, keep_alpha=self.versions.as_png)  # also for the copy: it is not to be broken
            for target in missing:
                version = shrink(pixels, targets[target], self.versions.interpolation)
                save_picture(target, cut(version, self.versions.divisible_by), state)
            written = len(missing) + self._copy(path, job.target, anew)
        for file in job.associated if self.versions.with_associated else ():
            for stem in stems:
                target = job.target.with_name(stem + file.name[len(path.stem) :])
                written += self._copy(file, target, anew) if self._is_free(target) else 0
        return written

    def _copy(self, file: Path, target: Path, anew: bool) -> int:
        if not anew and self._is_done(target, state_of(file)):
            return 0
        copy_file(file, target)
        return 1

    def _is_done(self, target: Path, state: os.stat_result) -> bool:
        if done := is_done(target, state):
            self.newer.update({target} if is_newer(target, state) else ())
        return done

    def _is_free(self, target: Path) -> bool:
        """Whether nothing in the source folder has the name of a version, or of what is copied for one."""
        if os.path.normcase(target) not in self._copies:
            return True
        notice(f"some files are named as smaller versions already, as {target.name}: they are copied as they are")
        return False

    def _can_be_cut(self, path: Path, size: Size) -> bool:
        divisor = self.versions.divisible_by
        if min(size) >= divisor:
            return True
        shown = "{}x{} pixels".format(*size)
        warn(f"{path}: a version of {shown} is left out: it is smaller than --divisible_by {divisor}")
        return False


def _pixels(path: Path, *, keep_alpha: bool) -> np.ndarray:
    colours, alpha = decode(path, keep_alpha=keep_alpha, legacy=False)
    return colours if alpha is None else np.dstack([colours, alpha])
