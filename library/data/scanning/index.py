"""The index kept beside the data (`cache_info`): sizes and captions of images, checked against file times."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.console import rank, warn
from library.data.caching.npz import read_arrays, write_arrays
from library.data.scanning.columns import Texts
from library.data.scanning.listing import Listing

_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What a scan reads of N image files."""

    sizes: np.ndarray
    """(N, 2) int32 width and height"""
    animated: np.ndarray
    """(N,) bool"""
    unusual: np.ndarray
    """(N,) bool, whether the caption's encoding had to be guessed"""
    captions: Texts

    def take(self, rows: np.ndarray) -> "Facts":
        """Those of some rows."""
        return Facts(self.sizes[rows], self.animated[rows], self.unusual[rows], self.captions.take(rows))

    def joined(self, other: "Facts") -> "Facts":
        """These and then those."""
        names = ("sizes", "animated", "unusual")
        columns = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        return Facts(captions=self.captions.joined(other.captions), **columns)


NO_FACTS = Facts(np.empty((0, 2), np.int32), np.empty(0, bool), np.empty(0, bool), Texts.of([]))


def index_path(folder: Path, caption_extension: str) -> Path:
    """Where the index of a folder lies, for captions with this extension."""
    return folder / f"atelier_index{caption_extension}.npz"


def load(listing: Listing, legacy: bool) -> tuple[Facts, np.ndarray]:
    """What is known of a folder, and for each of its images the row of its facts, or -1 if its files have changed."""
    nothing = NO_FACTS, np.full(len(listing.images), -1)
    stored = read_arrays(index_path(listing.folder, listing.caption_extension))
    if stored is None:
        return nothing
    try:
        if stored["made_by"].tolist() != [_VERSION, int(legacy)]:
            return nothing
        names = stored["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        captions = Texts.packed(stored["captions"], stored["caption_lengths"])
        facts = Facts(stored["sizes"], stored["animated"], stored["unusual"], captions)
        stamps = stored["stamps"]
        bytes_of_captions = int(np.maximum(captions.lengths, 0).sum())
        if {len(names)} != {len(c) for c in (facts.sizes, facts.animated, facts.unusual, captions, stamps)}:
            return nothing
        if bytes_of_captions != len(captions.blob) or (facts.sizes < 1).any():
            return nothing
        if names == listing.images:
            rows = np.arange(len(names))
        else:
            known = dict(zip(names, range(len(names)), strict=True))
            rows = np.fromiter((known.get(name, -1) for name in listing.images), np.int64, len(listing.images))
        rows[(stamps[rows] != listing.stamps).any(axis=1) if len(names) else slice(None)] = -1
    except (KeyError, ValueError, IndexError, TypeError):
        return nothing
    return facts, rows


def save(listing: Listing, rows: np.ndarray, facts: Facts, legacy: bool) -> None:
    """Writes the facts of the images numbered `rows`. A folder that cannot be written to is reported."""
    if rank() > 0:
        return
    unread = (listing.caption_rows[rows] >= 0) & (facts.captions.lengths < 0)  # they may be allowed to be next time
    rows, facts = rows[~unread], facts.take(np.flatnonzero(~unread))
    captions = facts.captions.compact()
    names = "".join(f"{listing.images[row]}\0" for row in rows.tolist())
    path = index_path(listing.folder, listing.caption_extension)
    try:
        write_arrays(
            path,
            {
                "made_by": np.array([_VERSION, int(legacy)]),
                "names": np.frombuffer(names.encode("utf-8", "surrogateescape"), np.uint8),
                "stamps": listing.stamps[rows],
                "sizes": facts.sizes,
                "animated": facts.animated,
                "unusual": facts.unusual,
                "captions": np.frombuffer(captions.blob, np.uint8),
                "caption_lengths": captions.lengths,
            },
        )
    except OSError as problem:
        warn(f"{path}: the index cannot be kept ({problem.strerror}), so the next start reads all files again")
