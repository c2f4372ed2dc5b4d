"""What there is to train on: one pass over the image folders -> a RecordTable.

The table is a folder of memory-mapped columns. Processes share its pages and pickle it as its path, so a record costs
its bytes once per machine and no Python object; `table[i]` is a view made when asked for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.buckets import Buckets, Geometry, Size, cover
from library.data.config import DatasetConfig
from library.data.scanning.columns import TextColumn
from library.data.scanning.scan import COLUMNS, TEXTS, Builder, SubsetReport, printable
from library.data.scratch import ScratchFolder, saying_if_full
from library.errors import UserError

NOTHING_DECODES = "no image to train on is left: not one of them can be decoded"


@dataclass(frozen=True, slots=True)
class Record:
    """One image, as one subset uses it."""

    index: int
    key: str
    """Its name in addresses of random choices; says nothing of where the data lies on this machine."""
    path: str
    caption: str
    """The caption file's text, maybe of several lines, or the class tokens."""
    width: int
    height: int
    bucket: Size
    dataset: int
    subset: int
    """Index within its dataset."""
    repeats: float
    """Times it is used per epoch, on average; 0 for regularisation images in excess of the training samples."""
    validation: bool
    """Whether it is held out; then its repeats are 0."""
    mask: str
    """Path of its mask file, or nothing."""
    cache_stem: str
    """Path that the names of its caches start with; no other image of its folder has the same."""
    shared_stem: bool
    """Whether another image of its folder has the same stem, or has it as its name: then a file that is named after
    the stem may be the other's."""


class RecordTable:
    """All images of a run, sorted by dataset, subset and normalised file name. Made by `scan`."""

    sizes: np.ndarray
    """(N, 2) int32 width and height"""
    buckets: np.ndarray
    """(N, 2) int32 the same of its bucket"""
    subsets: np.ndarray
    """(N, 2) int32 dataset and subset"""
    repeats: np.ndarray
    """(N,) float64 uses per epoch"""
    validation: np.ndarray
    """(N,) bool, held out"""

    def __init__(self, folder: Path, scratch: ScratchFolder | None = None):
        self.folder = folder
        for name in COLUMNS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        self._names, self._captions, self._masks = (TextColumn(folder, name) for name in TEXTS)
        facts = json.loads((folder / "facts.json").read_text())
        self._roots: list[list[str]] = facts["roots"]
        self._mask_roots: list[list[str]] = facts["mask_roots"]
        self._predefined: list[bool] = facts["predefined"]
        self.reports = tuple(
            SubsetReport(**{name: tuple(v) if isinstance(v, list) else v for name, v in report.items()})
            for report in facts["reports"]
        )
        self._scratch = scratch  # the last attribute is the last to go, after the maps of what is in the folder

    def __reduce__(self):
        return RecordTable, (self.folder,)

    def __len__(self) -> int:
        return len(self.repeats)

    def __getitem__(self, index: int) -> Record:
        dataset, subset = self.subsets[index].tolist()
        width, height = self.sizes[index].tolist()
        name, mask = self._names[index], self._masks[index]
        path = os.path.join(self._roots[dataset][subset], name)
        return Record(
            index=int(index),
            key=_key(dataset, subset, name),
            path=path,
            caption=self._captions[index],
            width=width,
            height=height,
            bucket=tuple(self.buckets[index].tolist()),
            dataset=dataset,
            subset=subset,
            repeats=float(self.repeats[index]),
            validation=bool(self.validation[index]),
            mask=mask and os.path.join(self._mask_roots[dataset][subset], mask),
            cache_stem=path if self.full_stems[index] else os.path.splitext(path)[0],
            shared_stem=bool(self.shared_stems[index]),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @property
    def in_use(self) -> int:
        """How many of the images are used at all."""
        return int(np.count_nonzero(self.repeats))

    @property
    def held_out(self) -> np.ndarray:
        """The indices of the images for validation, which are in no batch."""
        return np.flatnonzero(self.validation)

    def predefined(self, dataset: int) -> bool:
        """Whether the buckets of a dataset are the train_resolutions of its metadata files."""
        return self._predefined[dataset]

    def training(self, datasets: Sequence[DatasetConfig]) -> np.ndarray:
        """(N,) whether each image is in use and no regularisation image."""
        chosen = self.repeats > 0
        for number, dataset in enumerate(datasets):
            regular = [index for index, subset in enumerate(dataset.subsets) if subset.is_reg]
            chosen &= (self.subsets[:, 0] != number) | ~np.isin(self.subsets[:, 1], regular)
        return chosen

    def key(self, index: int) -> str:
        """`self[index].key`, without making the rest of the record."""
        dataset, subset = self.subsets[index].tolist()
        return _key(dataset, subset, self._names[index])

    def caption(self, index: int) -> str:
        """`self[index].caption`, without making the rest of the record."""
        return self._captions[index]

    def by_bucket(self, records: np.ndarray | None = None) -> Iterator[tuple[int, Size, np.ndarray]]:
        """(dataset, bucket, records) for each bucket of each dataset, in that order.

        Of all images in use, or of `records`, which must be sorted.
        """
        used = np.flatnonzero(self.repeats) if records is None else records
        owners = self.subsets[used, 0].astype(np.int64)
        for side in (0, 1):
            owners = owners << 20 | self.buckets[used, side]
        order = np.argsort(owners, kind="stable")
        codes, firsts = np.unique(owners[order], return_index=True)
        for code, members in zip(codes.tolist(), np.split(used[order], firsts)[1:], strict=True):
            yield code >> 40, (code >> 20 & 0xFFFFF, code & 0xFFFFF), members


def scan(datasets: Sequence[DatasetConfig]) -> RecordTable:
    """Reads the names, sizes and captions of all images into a temporary table, deleted with this process.

    Only headers of images are read. What cannot be read and folders without images are left out with a warning. Raises
    UserError if no training image is left, if captions lie beside the images under another extension than chosen, or
    for a metadata file that cannot be understood or needs a resolution, or if the temporary folder is full.
    """
    scratch = ScratchFolder("records")
    with saying_if_full(scratch.path):
        _fill(scratch.path, datasets)
    return RecordTable(scratch.path, scratch)


def _fill(folder: Path, datasets: Sequence[DatasetConfig]) -> None:
    """Writes the columns of a table."""
    builder = Builder(folder)
    for index, dataset in enumerate(datasets):
        builder.add(index, dataset)
    if not builder.training_images:
        subsets = [subset for dataset in datasets for subset in dataset.subsets if not subset.is_reg]
        where = ", ".join(str(subset.metadata_file or subset.image_dir) for subset in subsets) or "the datasets"
        folders = any(subset.metadata_file and subset.image_dir is None for subset in subsets)
        remedy = "set image_dir to the folder of its images" if folders else "put readable images there"
        raise UserError(f"no image to train on is left in {where}: {remedy}")
    builder.warn_of_empty_captions()
    builder.write()


def geometry_of(record: Record, buckets: Buckets | None) -> Geometry:
    """How the image gets to its bucket; `buckets` are its dataset's, None where metadata says all of them."""
    size = record.width, record.height
    chosen = buckets and buckets.choose(size)
    return chosen if chosen and chosen.bucket == record.bucket else cover(size, record.bucket)


def check_buckets(table: RecordTable, datasets: Sequence[DatasetConfig], step: int) -> None:
    """Raises UserError if a train_resolution is no multiple of the model's bucket step."""
    unfit = np.flatnonzero((np.asarray(table.buckets) % step).any(axis=1))
    given = [index for index in range(len(datasets)) if table.predefined(index)]
    unfit = unfit[np.isin(table.subsets[unfit, 0], given)]
    if len(unfit):
        record = table[unfit[0]]
        width, height = (max(round(side / step), 1) * step for side in record.bucket)
        file = datasets[record.dataset].subsets[record.subset].metadata_file
        raise UserError(
            f"{file}: {os.path.basename(record.path)}: train_resolution {record.bucket[0]}x{record.bucket[1]} is no "
            f"multiple of {step}, which this model needs: prepare the latents again, for {width}x{height} or the like"
        )


def _key(dataset: int, subset: int, name: str) -> str:
    return f"{dataset}/{subset}/{printable(name.replace(os.sep, '/'))}"
