"""What there is to train on: one pass over the image folders -> a RecordTable.

The table is a folder of memory-mapped columns. Processes share its pages and pickle it as its path, so a record costs
its bytes once per machine and no Python object; `table[i]` is a view made when asked for.
"""

import dataclasses
import json
import os
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.console import rank, warn
from library.data.buckets import Buckets, Size
from library.data.config import DatasetConfig, SubsetConfig
from library.data.files import file_names, is_image
from library.data.images import BrokenImage, read_size
from library.data.scratch import ScratchFolder
from library.errors import UserError, some

NOTHING_DECODES = "no image to train on is left: not one of them can be decoded"
_CAPTION_EXTENSIONS = (".txt", ".caption", ".tags")  # what captions are usually found in


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
    repeats: int
    """Times it is used per epoch; 0 for regularisation images in excess of the training samples."""


@dataclass(frozen=True, slots=True)
class SubsetReport:
    """What a scan found in one image folder."""

    dataset: int
    subset: int
    images: int
    captions_missing: int
    broken: tuple[str, ...]
    """Names of the files that should be images and cannot be read."""


class RecordTable:
    """All images of a run, sorted by dataset, subset and normalised file name. Made by `scan`."""

    def __init__(self, folder: Path, scratch: ScratchFolder | None = None):
        self.folder = folder
        self.sizes, self.buckets, self.subsets, self.repeats = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("sizes", "buckets", "subsets", "repeats")
        )
        """(N, 2) width and height; (N, 2) the same of its bucket; (N, 2) dataset and subset; (N,) uses per epoch"""
        self._names = _TextColumn(folder, "names")
        self._captions = _TextColumn(folder, "captions")
        facts = json.loads((folder / "facts.json").read_text())
        self._image_dirs: list[list[str]] = facts["image_dirs"]
        self.reports = tuple(
            SubsetReport(**(report | {"broken": tuple(report["broken"])})) for report in facts["reports"]
        )
        self._scratch = scratch  # the last attribute is the last to go, after the maps of what is in the folder

    def __reduce__(self):
        return RecordTable, (self.folder,)

    def __len__(self) -> int:
        return len(self.repeats)

    def __getitem__(self, index: int) -> Record:
        dataset, subset = self.subsets[index].tolist()
        width, height = self.sizes[index].tolist()
        name = self._names[index]
        return Record(
            index=int(index),
            key=_key(dataset, subset, name),
            path=os.path.join(self._image_dirs[dataset][subset], name),
            caption=self._captions[index],
            width=width,
            height=height,
            bucket=tuple(self.buckets[index].tolist()),
            dataset=dataset,
            subset=subset,
            repeats=int(self.repeats[index]),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @property
    def in_use(self) -> int:
        """How many of the images are used at all."""
        return int(np.count_nonzero(self.repeats))

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

    def by_bucket(self) -> Iterator[tuple[int, Size, np.ndarray]]:
        """(dataset, bucket, records) for each bucket of each dataset that has images in use, in that order."""
        used = np.flatnonzero(self.repeats)
        owners = np.column_stack([self.subsets[used, 0], self.buckets[used]])
        for dataset, width, height in np.unique(owners, axis=0).tolist():
            yield dataset, (width, height), used[(owners == (dataset, width, height)).all(axis=1)]


def scan(datasets: Sequence[DatasetConfig]) -> RecordTable:
    """Reads the names, sizes and captions of all images into a temporary table, deleted with this process.

    Only headers of images are read. What cannot be read and folders without images are left out with a warning. Raises
    UserError if no training image is left, or if captions lie beside the images under another extension than chosen.
    """
    builder = _Builder()
    for index, dataset in enumerate(datasets):
        builder.add(index, dataset)
    if not builder.training_images:
        training = [str(subset.image_dir) for dataset in datasets for subset in dataset.subsets if not subset.is_reg]
        where = ", ".join(training) or "the datasets"
        raise UserError(f"no image to train on is left in {where}: put readable images there")
    builder.warn_of_empty_captions()
    scratch = ScratchFolder("records")
    builder.write(scratch.path)
    image_dirs = [[os.fspath(subset.image_dir) for subset in dataset.subsets] for dataset in datasets]
    facts = {"image_dirs": image_dirs, "reports": [dataclasses.asdict(report) for report in builder.reports]}
    (scratch.path / "facts.json").write_text(json.dumps(facts))
    return RecordTable(scratch.path, scratch)


class _Builder:
    """Collects the columns in compact form while folders are scanned."""

    def __init__(self):
        self.sizes, self.buckets, self.subsets, self.repeats = (array("i") for _ in range(4))
        self.names, self.captions = _TextWriter(), _TextWriter()
        self.reports: list[SubsetReport] = []
        self.training_images = 0
        self.empty_captions = 0
        self.first_empty = ""

    def add(self, index: int, dataset: DatasetConfig) -> None:
        """Scans the subsets of one dataset."""
        first = len(self.repeats)
        buckets = dataset.buckets()
        is_reg = array("b")
        for number, subset in enumerate(dataset.subsets):
            before = len(self.repeats)
            self.reports.append(self._add_subset(index, number, subset, buckets))
            is_reg.extend([subset.is_reg] * (len(self.repeats) - before))
        repeats = balanced_repeats(np.array(self.repeats[first:]), np.array(is_reg, dtype=bool))
        self.repeats[first:] = array("i", repeats.tolist())

    def _add_subset(self, dataset: int, number: int, subset: SubsetConfig, buckets: Buckets) -> SubsetReport:
        listing = set(file_names(subset.image_dir))
        names = sorted(filter(is_image, listing), key=lambda name: (_normalised(name), name))
        if not names:
            warn(f"{subset.image_dir}: no images in it, the folder is left out")
        missing: list[str] = []
        unusual: list[str] = []
        broken: dict[str, str] = {}
        bar = tqdm(names, desc=f"reading {subset.name}", unit="img", delay=1, leave=False, disable=rank() > 0)
        for name in bar:
            try:
                size = read_size(subset.image_dir / name)
            except BrokenImage as problem:
                broken[name] = str(problem)
                continue
            caption = subset.class_tokens
            caption_name = os.path.splitext(name)[0] + subset.caption_extension
            if caption_name in listing:
                caption, is_utf8 = _read_caption(subset.image_dir / caption_name)
                unusual += [] if is_utf8 else [caption_name]
            else:
                missing.append(name)
            if not caption:
                self.empty_captions += 1
                self.first_empty = self.first_empty or os.path.join(subset.image_dir, name)
            self.sizes.extend(size)
            self.buckets.extend(buckets.choose(size).bucket)
            self.subsets.extend((dataset, number))
            self.repeats.append(subset.num_repeats)
            self.names.append(name)
            self.captions.append(caption)
        if broken:
            named = some([f"{name} ({reason})" for name, reason in broken.items()])
            warn(f"{subset.image_dir}: {len(broken)} of {len(names)} images cannot be read and are left out: {named}")
        if unusual:
            warn(f"{subset.image_dir}: {len(unusual)} captions are not UTF-8 and are read as Latin-1: {some(unusual)}")
        images = len(names) - len(broken)
        self.training_images += 0 if subset.is_reg else images
        _look_for_other_captions(subset, listing, missing, images)
        return SubsetReport(dataset, number, images, len(missing), tuple(broken))

    def warn_of_empty_captions(self) -> None:
        if self.empty_captions:
            count = "1 image has" if self.empty_captions == 1 else f"{self.empty_captions} images have"
            warn(
                f"{count} neither a caption nor class tokens, or an empty caption file, and will be trained with an "
                f"empty caption; the first is {self.first_empty}"
            )

    def write(self, folder: Path) -> None:
        for name in ("sizes", "buckets", "subsets", "repeats"):
            column = np.array(getattr(self, name), dtype=np.int32)
            np.save(folder / f"{name}.npy", column if name == "repeats" else column.reshape(-1, 2))
        self.names.write(folder, "names")
        self.captions.write(folder, "captions")


def balanced_repeats(repeats: np.ndarray, is_reg: np.ndarray) -> np.ndarray:
    """Uses per epoch (N,), so that regularisation images are used as often in all as training images.

    The regularisation images are gone through in order, each `repeats` times in a row, and again from the start, until
    there are enough: a long list is cut, a short one repeated.
    """
    balanced = repeats.copy()
    cycle = repeats[is_reg]
    if len(cycle):
        rounds, rest = divmod(int(repeats[~is_reg].sum()), int(cycle.sum()))
        used_before = np.cumsum(cycle) - cycle
        balanced[is_reg] = rounds * cycle + np.clip(rest - used_before, 0, cycle)
    return balanced


def _look_for_other_captions(subset: SubsetConfig, listing: set[str], missing: list[str], images: int) -> None:
    """Captions that are there but not under the subset's extension are more likely overlooked than not wanted."""
    stems = [os.path.splitext(name)[0] for name in missing]
    counts = {extension: sum(stem + extension in listing for stem in stems) for extension in _CAPTION_EXTENSIONS}
    extension, count = max(counts.items(), key=lambda item: item[1])
    if not count:
        return
    found = f"{count} of the {images} images have a {extension} file and no {subset.caption_extension} file"
    if len(missing) < images or subset.is_reg:
        warn(f"{subset.image_dir}: {found}: the {extension} files are not used")
        return
    setting = f'set caption_extension = "{extension}" in {subset.place}, or ' if subset.place else ""
    raise UserError(f"{subset.image_dir}: {found}: {setting}use --caption_extension {extension}")


def _read_caption(path: Path) -> tuple[str, bool]:
    """The text of a caption file without blank edges, and whether it was UTF-8 (or UTF-16 that says so)."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text, known = data.decode(encoding), True
    except UnicodeDecodeError:
        text, known = data.decode("latin-1"), False
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.strip() for line in lines).strip("\n"), known


def _normalised(name: str) -> str:
    """One spelling for file names that differ only in how accents are composed, as between macOS and the others."""
    return unicodedata.normalize("NFC", name)


def _key(dataset: int, subset: int, name: str) -> str:
    text = f"{dataset}/{subset}/{_normalised(name)}"
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _TextWriter:
    """Texts one after the other in one UTF-8 blob, with the offset of each."""

    def __init__(self):
        self.blob = bytearray()
        self.offsets = array("q", [0])

    def append(self, text: str) -> None:
        self.blob += text.encode("utf-8", "surrogateescape")
        self.offsets.append(len(self.blob))

    def write(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}.offsets.npy", np.array(self.offsets, dtype=np.int64))
        # An empty file cannot be mapped; nobody reads the byte added here.
        np.save(folder / f"{name}.npy", np.frombuffer(bytes(self.blob) + b"\0", dtype=np.uint8))


class _TextColumn:
    """What `_TextWriter` wrote, memory-mapped."""

    def __init__(self, folder: Path, name: str):
        self.blob = np.load(folder / f"{name}.npy", mmap_mode="r")
        self.offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r")

    def __getitem__(self, index: int) -> str:
        start, stop = self.offsets[index : index + 2].tolist()
        return self.blob[start:stop].tobytes().decode("utf-8", "surrogateescape")
