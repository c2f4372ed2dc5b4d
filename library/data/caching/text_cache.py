"""What the text encoders say of captions, computed once: kept in a temporary file, or in files beside the images."""

import errno
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from library import console
from library.bars import progress_bar
from library.data import captions
from library.data.caching.npz import read_arrays, write_arrays
from library.data.config import DatasetConfig
from library.data.images import BrokenImage
from library.data.records import Record, RecordTable
from library.data.scratch import ScratchFolder, saying_if_full
from library.errors import UserError, some

Encode = Callable[[list[str]], dict[str, torch.Tensor]]
"""Captions (B) -> what the text encoders say of them, by kind and batch first."""

_EMPTY = 0  # the row of the empty caption
_OWN_FILE = -1
_MADE_FROM = "made_from"
_MISSING = "missing"
_CHECKERS = 8  # threads: a check waits for the disk longer than it computes


@dataclass(frozen=True)
class TextLayout:
    """How a family's text encoder outputs are kept in files, and what decides them besides the caption."""

    suffix: str
    """End of the files' names: `_te_outputs.npz` for SDXL, another for the others."""
    arrays: Mapping[str, str]
    """Kind of output, as the family calls it -> name of its array in a file."""
    fingerprint: str
    """Of the encoders' weights, and of all that is merged into them."""
    token_length: int = 75
    clip_skip: int | None = None
    weighted: bool = False
    """Whether weights in captions, as in `(word:1.3)`, are heeded."""

    def path(self, record: Record) -> str:
        """The file that keeps a record's outputs."""
        return record.cache_stem + self.suffix

    def made_from(self, caption: str) -> str:
        """All that outputs depend on, as a file records it: JSON in ASCII."""
        facts = {
            "caption": caption,
            "token_length": self.token_length,
            "clip_skip": self.clip_skip,
            "weighted": self.weighted,
            "encoders": self.fingerprint,
        }
        return json.dumps(facts, sort_keys=True)


class TextCache:
    """Text encoder outputs by record, and those of the empty caption. Pickled as its path."""

    def __init__(self, folder: Path, scratch: ScratchFolder | None = None):
        self.folder = folder
        facts = json.loads((folder / "facts.json").read_text())
        self._suffix: str = facts["suffix"]
        self._arrays: dict[str, str] = facts["arrays"]
        self._shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        width = sum(map(math.prod, self._shapes.values()))
        self._values = np.memmap(folder / "values.bin", dtype=np.float32, mode="r").reshape(-1, width)
        self._scratch = scratch  # the last attribute is the last to go, after the maps of what is in the folder

    def __reduce__(self):
        return TextCache, (self.folder,)

    def outputs(self, record: Record, dropped: bool) -> dict[str, torch.Tensor]:
        """What the encoders say of a record's caption, or of the empty one if it is `dropped`: float32 copies by kind,
        without a batch axis. Raises BrokenImage if the record's file has gone or is damaged.
        """
        row = _EMPTY if dropped else int(self._rows[record.index])
        arrays = self._from_file(record.cache_stem + self._suffix) if row == _OWN_FILE else self._from_row(row)
        return {kind: torch.from_numpy(arrays[name]) for kind, name in self._arrays.items()}

    def _from_row(self, row: int) -> dict[str, np.ndarray]:
        arrays, start = {}, 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            arrays[name] = self._values[row, start:stop].reshape(shape).copy()
            start = stop
        return arrays

    def _from_file(self, path: str) -> dict[str, np.ndarray]:
        arrays = read_arrays(path) or {}
        for name, shape in self._shapes.items():
            values = arrays.get(name)
            if values is None or values.shape != shape or not np.isfinite(values).all():
                raise BrokenImage(f"{path} holds no {name} that fits, delete it to have it made anew")
        return {name: arrays[name].astype(np.float32) for name in self._shapes}


@dataclass
class TextFiles:
    """What became of the files beside the images. Counts are those of one process's share."""

    valid: int = 0
    """Files that were right already."""
    written: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    """Of those written: how many were there before, by what was wrong with them."""
    closed: Counter[str] = field(default_factory=Counter)
    """How many files are missing or wrong in folders that cannot be written to; the same in every process."""
    shared: int = 0
    """Records that use an image with another caption than its file keeps; the same in every process."""
    left: set[int] = field(default_factory=set)
    """Records without a file that fits: the shared ones, and those in closed folders; the same in every process."""

    @classmethod
    def together(cls, shares: Sequence["TextFiles"]) -> "TextFiles":
        """What became of the files of all processes."""
        total = cls(closed=shares[0].closed, shared=shares[0].shared, left=shares[0].left)
        for share in shares:
            total.valid += share.valid
            total.written += share.written
            total.replaced += share.replaced
        return total

    def report(self) -> None:
        """Tell the user of what was replaced and of what has no file."""
        if self.replaced:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.replaced.items()))
            console.notice(f"files of text encoder outputs were replaced: {reasons}")
        if self.closed:
            folders = some(sorted(self.closed))
            console.warn(f"{self.closed.total()} files of text encoder outputs cannot be written to {folders}")
        if self.shared:
            console.notice(
                f"files keep one caption of an image, {self.shared} uses of images with another one have none"
            )


def cache_text(
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    encode: Encode,
    layout: TextLayout,
    *,
    to_disk: bool = False,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
    skip_check: bool = False,
) -> TextCache:
    """Encodes the captions of all records, each distinct one once, and the empty one.

    In memory, every process encodes for itself. With `to_disk` each of `world` processes writes its share, as
    `write_text_files` does, calls `wait`, which returns when all have, and keeps in memory what has no file. Raises
    UserError if outputs are not finite or a disk is full.
    """
    batches = _batches(table, datasets, layout, batch_size)
    left = {record for batch in batches for caption in batch for record in caption.records()}
    if to_disk:
        files = _write_files(batches, encode, layout, rank, world, skip_check)
        files.report()
        wait()
        left = files.left
        if left:
            console.notice(f"the text encoder outputs of {len(left)} images are kept in a temporary file for this run")
    scratch = ScratchFolder("text")
    empty = _Caption("", "the empty caption")
    needed = [batch for batch in batches if any(not left.isdisjoint(caption.records()) for caption in batch)]
    rows = np.full(len(table), _OWN_FILE, dtype=np.int32)
    shapes: dict[str, tuple[int, ...]] = {}
    row = _EMPTY
    with open(scratch.path / "values.bin", "wb") as file:
        for caption, arrays in _encoded([[empty], *needed], encode, layout):
            users = left.intersection(caption.records())
            if users or caption is empty:
                shapes = {name: values.shape for name, values in arrays.items()}
                rows[list(users)] = row
                row += 1
                with saying_if_full(scratch.path):
                    file.write(b"".join(values.tobytes() for values in arrays.values()))
                    file.flush()
    facts = {"suffix": layout.suffix, "arrays": dict(layout.arrays), "shapes": shapes}
    with saying_if_full(scratch.path):
        np.save(scratch.path / "rows.npy", rows)
        (scratch.path / "facts.json").write_text(json.dumps(facts))
    return TextCache(scratch.path, scratch)


def write_text_files(
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    encode: Encode,
    layout: TextLayout,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    skip_check: bool = False,
) -> TextFiles:
    """Makes the files beside the images that are missing or made from something else, in this process's share.

    Captions are encoded in batches that depend on the table alone, all of a batch if one is needed, so that neither
    what is there already nor the number of processes changes a result. With `skip_check` every file that exists counts
    as valid. `encode` is not called where there is nothing to do. Raises UserError if outputs are not finite or the
    disk is full; what is written stays.
    """
    return _write_files(_batches(table, datasets, layout, batch_size), encode, layout, rank, world, skip_check)


@dataclass
class _Caption:
    """One of the distinct captions, and who needs it."""

    text: str
    whose: str
    """How a message refers to it."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """The files that keep its outputs -> the records that use each."""
    elsewhere: list[int] = field(default_factory=list)
    """Records whose file keeps another caption of the same image."""

    def records(self) -> Iterator[int]:
        for users in self.files.values():
            yield from users
        yield from self.elsewhere


def _batches(
    table: RecordTable, datasets: Sequence[DatasetConfig], layout: TextLayout, size: int | None
) -> list[list[_Caption]]:
    """The distinct captions of all records in use or held out, in the order of the table."""
    found: dict[str, _Caption] = {}
    keeps: dict[str, str] = {}
    for record in table:
        if not record.repeats and not record.validation:
            continue
        text = captions.fixed(record.caption, datasets[record.dataset].subsets[record.subset].captions)
        caption = found.setdefault(text, _Caption(text, f"the caption of {record.path}"))
        path = layout.path(record)
        if keeps.setdefault(path, text) == text:
            caption.files.setdefault(path, []).append(record.index)
        else:
            caption.elsewhere.append(record.index)
    size, distinct = size or 1, list(found.values())
    return [distinct[start : start + size] for start in range(0, len(distinct), size)]


def _encoded(
    batches: Sequence[Sequence[_Caption]], encode: Encode, layout: TextLayout
) -> Iterator[tuple[_Caption, dict[str, np.ndarray]]]:
    """Each caption with its outputs by the names in files, float32."""
    count = sum(map(len, batches))
    with progress_bar(total=count, desc="caching captions", delay=1, disable=console.rank() > 0) as bar:
        for batch in batches:
            with torch.no_grad():
                outputs = encode([caption.text for caption in batch])
            arrays = {name: outputs[kind].float().cpu().numpy() for kind, name in layout.arrays.items()}
            for index, caption in enumerate(batch):
                own = {name: values[index] for name, values in arrays.items()}
                if not all(np.isfinite(values).all() for values in own.values()):
                    what = f"the text encoders' outputs for {caption.whose} are not finite"
                    raise UserError(f"{what}: use --mixed_precision bf16 or no")
                yield caption, own
            bar.update(len(batch))


def _write_files(
    batches: Sequence[Sequence[_Caption]], encode: Encode, layout: TextLayout, rank: int, world: int, skip_check: bool
) -> TextFiles:
    """See `write_text_files`; one batch after the other goes to the next process."""
    own = [caption for batch in batches[rank::world] for caption in batch]
    every = [caption for batch in batches for caption in batch]
    folders = {os.path.dirname(path) for caption in every for path in caption.files}
    closed = {folder for folder in folders if not _is_writable(folder)}
    share = {path: caption.text for caption in own for path in caption.files}
    # of folders that stay as they are, every process has to know what is missing there
    others = {path: c.text for c in every for path in c.files if os.path.dirname(path) in closed}
    wrong = _wrong_files(share | others, layout, skip_check)
    files = TextFiles(valid=sum(path not in wrong for path in share))
    for caption in every:
        files.shared += len(caption.elsewhere)
        files.left.update(caption.elsewhere)
        for path, users in caption.files.items():
            if path in wrong and os.path.dirname(path) in closed:
                files.closed[os.path.dirname(path)] += 1
                files.left.update(users)
                del wrong[path]
    todo = [batch for batch in batches[rank::world] if any(not wrong.keys().isdisjoint(c.files) for c in batch)]
    for caption, arrays in _encoded(todo, encode, layout):
        recorded = np.frombuffer(layout.made_from(caption.text).encode("ascii"), dtype=np.uint8)
        for path in [path for path in caption.files if path in wrong]:
            try:
                write_arrays(path, {**arrays, _MADE_FROM: recorded})
            except OSError as problem:
                raise UserError(
                    f"{path} cannot be written ({problem.strerror}): free some space or make its folder writable, "
                    "and start again, the files that are finished are used"
                ) from None
            files.written += 1
            if wrong[path] != _MISSING:
                files.replaced[wrong[path]] += 1
    return files


def _wrong_files(wanted: Mapping[str, str], layout: TextLayout, skip_check: bool) -> dict[str, str]:
    """What is wrong with files, given the caption of each; those that are right are left out."""

    def problem(path: str) -> str | None:
        if skip_check:
            return None if os.path.exists(path) else _MISSING
        arrays = read_arrays(path, [_MADE_FROM])
        if arrays is None:
            return "damaged" if os.path.exists(path) else _MISSING
        if _MADE_FROM not in arrays:
            return "of unknown origin"
        fits = arrays[_MADE_FROM].tobytes() == layout.made_from(wanted[path]).encode("ascii")
        return None if fits else "made from another caption or other text encoders"

    with ThreadPoolExecutor(_CHECKERS) as pool:
        bar = progress_bar(
            pool.map(problem, wanted),
            desc="checking caption caches",
            total=len(wanted),
            delay=1,
            disable=console.rank() > 0,
        )
        problems = dict(zip(wanted, bar, strict=True))
    return {path: reason for path, reason in problems.items() if reason is not None}


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as problem:
        return problem.errno == errno.ENOSPC  # a full disk is for whoever writes to it to report
