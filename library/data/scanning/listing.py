"""What lies in an image folder, from one pass over it."""

import os
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from library.data.scanning.files import IMAGE_SUFFIXES
from library.data.scanning.reading import in_chunks


@dataclass(frozen=True)
class Listing:
    """The files directly in a folder."""

    folder: Path
    caption_extension: str
    images: list[str]
    """Names, sorted by their normalised spelling."""
    captions: dict[str, int]
    """Stems of the caption files; the value is for `caption_rows` alone."""
    others: frozenset[str]
    """Names of all other files."""
    image_stamps: np.ndarray
    """(images, 2) int64 bytes and modification time in ns; (0, 2) if they were not asked for"""
    caption_stamps: np.ndarray
    """The same of the captions, in the order they were found."""

    @cached_property
    def stems(self) -> list[str]:
        """The images' names without their last suffix."""
        return [name.rpartition(".")[0] for name in self.images]

    @cached_property
    def caption_rows(self) -> np.ndarray:
        """(images,) the row in `caption_stamps` of each image's caption; -1 where it has none"""
        return np.fromiter((self.captions.get(stem, -1) for stem in self.stems), np.int64, len(self.stems))

    def caption_of(self, image: int) -> str:
        """The name of an image's caption file, or nothing."""
        return self.stems[image] + self.caption_extension if self.caption_rows[image] >= 0 else ""

    @property
    def stamps(self) -> np.ndarray:
        """(images, 4) int64: `image_stamps` and those of their captions, -1 where there is none"""
        captions = np.concatenate([self.caption_stamps, [[-1, -1]]])
        return np.concatenate([self.image_stamps, captions[self.caption_rows]], axis=1)

    @cached_property
    def shared_stems(self) -> np.ndarray:
        """(images,) whether another image has the same stem, or has it as its name, so that a file named after the
        stem may be either's; for the file system's idea of the same
        """
        stems, shared = _as_compared(self.stems), self.full_stems.copy()
        if shared.any():
            counts = Counter(stems)
            shared |= np.fromiter((counts[stem] > 1 for stem in stems), bool, len(stems))
        return shared

    @cached_property
    def full_stems(self) -> np.ndarray:
        """(images,) whether the image's caches are named after its full name, since its stem is an earlier image's
        stem or another image's full name: so no two have the same
        """
        stems = _as_compared(self.stems)
        full = np.zeros(len(stems), dtype=bool)
        if len(set(stems)) < len(stems):
            seen: set[str] = set()
            for index, stem in enumerate(stems):
                full[index] = stem in seen
                seen.add(stem)
        like_images = [index for index, stem in enumerate(stems) if stem.rpartition(".")[2].lower() in _SUFFIXES]
        if like_images:
            names = set(_as_compared(self.images))
            full[[index for index in like_images if stems[index] in names]] = True
        return full

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """Names by normalised spelling; of several with the same one the first."""
        return {normalised(name): name for name in reversed(self.images)}

    @cached_property
    def _suffixes(self) -> list[str]:
        return sorted({name.rpartition(".")[2] for name in self.images})

    def find(self, key: str) -> str | None:
        """The image of this name, or of this stem (the first of several), however its accents are composed."""
        key = normalised(key)
        spellings = (key, *(f"{key}.{suffix}" for suffix in self._suffixes))
        return next((self._spellings[spelling] for spelling in spellings if spelling in self._spellings), None)


def list_folder(folder: Path, caption_extension: str = "", *, stamps: bool = False) -> Listing:
    """The files directly in a folder; with `stamps`, sizes and times of images and captions, too. Raises OSError."""
    images: list[str] = []
    captions: dict[str, int] = {}
    others: set[str] = set()
    extension = caption_extension or "/"  # which no name has
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if not entry.is_file():
                continue
            if name.endswith(extension):
                captions[name[: -len(extension)]] = len(captions)
            elif name.rpartition(".")[2].lower() in _SUFFIXES and name[0] != ".":
                images.append(name)
            else:
                others.add(name)
    images.sort()
    if not "".join(images).isascii():
        images.sort(key=normalised)
    nothing = np.empty((0, 2), dtype=np.int64)
    return Listing(
        folder=folder,
        caption_extension=caption_extension,
        images=images,
        captions=captions,
        others=frozenset(others),
        image_stamps=_stamps(folder, images) if stamps else nothing,
        caption_stamps=_stamps(folder, [stem + extension for stem in captions]) if stamps else nothing,
    )


def _as_compared(names: list[str]) -> list[str]:
    """The names in the spelling that the file system compares."""
    return list(map(os.path.normcase, names)) if os.name == "nt" else names


def _stamps(folder: Path, names: list[str]) -> np.ndarray:
    """(N, 2) bytes and modification time of files; -1 where one has just gone"""
    inside = os.stat in os.supports_dir_fd  # spares the system the way to the folder
    place = os.open(folder, os.O_RDONLY) if inside else None
    prefix = "" if inside else os.path.join(folder, "")

    def look_up(some_names: list[str]) -> list[int]:
        numbers = []
        for name in some_names:
            try:
                stat = os.stat(prefix + name, dir_fd=place)
                numbers += (stat.st_size, stat.st_mtime_ns)
            except OSError:
                numbers += (-1, -1)
        return numbers

    stamps = array("q")
    try:
        for numbers in in_chunks(look_up, names):
            stamps.extend(numbers)
    finally:
        if inside:
            os.close(place)
    return np.frombuffer(stamps, dtype=np.int64).reshape(-1, 2)


def normalised(name: str) -> str:
    """One spelling for file names that differ only in how accents are composed, as between macOS and the others."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


_SUFFIXES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
