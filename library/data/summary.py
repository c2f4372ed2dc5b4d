"""The datasets in numbers: the table shown before training, and the ss_* metadata that describes them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from library.data.config import DatasetConfig, SubsetConfig
from library.data.plan import RunPlan
from library.data.records import RecordTable, SubsetReport


@dataclass(frozen=True)
class FolderRow:
    """One subset in the table before training."""

    dataset: int
    folder: str
    kind: str
    images: int
    repeats: int
    per_epoch: int
    """Times that images of it are used per epoch."""
    no_caption: int
    unreadable: int


@dataclass(frozen=True)
class BucketRow:
    """One bucket in the table before training."""

    dataset: int
    bucket: str
    images: int
    per_epoch: int
    batches: int
    """Batches per epoch, over all processes."""


@dataclass(frozen=True)
class Summary:
    """What will be trained on."""

    folders: tuple[FolderRow, ...]
    buckets: tuple[BucketRow, ...]
    images_per_epoch: int
    batches_per_epoch: int
    steps_per_epoch: int

    def __str__(self) -> str:
        """Plain text: a table of folders, a table of buckets, a line of totals."""
        totals = (
            f"per epoch: {self.images_per_epoch} images in {self.batches_per_epoch} batches, "
            f"{self.steps_per_epoch} optimizer steps"
        )
        return "\n\n".join([_text_table(FolderRow, self.folders), _text_table(BucketRow, self.buckets), totals])


def summarise(table: RecordTable, datasets: Sequence[DatasetConfig], plan: RunPlan) -> Summary:
    """The rows of the table before training."""
    folders = []
    for report in table.reports:
        subset = datasets[report.dataset].subsets[report.subset]
        per_epoch = int(table.repeats[_members(table, report.dataset, report.subset)].sum())
        folders.append(
            FolderRow(
                dataset=report.dataset,
                folder=subset.name,
                kind="regularisation" if subset.is_reg else "training",
                images=report.images,
                repeats=subset.num_repeats,
                per_epoch=per_epoch,
                no_caption=report.captions_missing,
                unreadable=len(report.broken),
            )
        )
    buckets = [
        BucketRow(
            group.dataset,
            f"{group.bucket[0]}x{group.bucket[1]}",
            len(np.unique(group.records)),
            group.samples,
            group.batches,
        )
        for group in plan.groups
    ]
    return Summary(tuple(folders), tuple(buckets), plan.images_per_epoch, plan.batches_per_epoch, plan.steps_per_epoch)


def dataset_metadata(table: RecordTable, datasets: Sequence[DatasetConfig], plan: RunPlan) -> dict[str, Any]:
    """The ss_* keys that describe the data, with plain Python values (nested ones are stored as JSON).

    With one dataset its options are keys of their own; with several they are in the list `ss_datasets`.
    """
    described = [_describe(table, plan, index, dataset) for index, dataset in enumerate(datasets)]
    metadata = {
        "ss_num_train_images": sum(facts["num_train_images"] for facts in described),
        "ss_num_reg_images": sum(facts["num_reg_images"] for facts in described),
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
    }
    if len(datasets) > 1:
        return metadata | {"ss_datasets": described}
    dataset, facts = datasets[0], described[0]
    options = {name: facts[name] for name in _FLAT if name in facts}
    subsets = dataset.subsets
    options |= {
        "resolution": str(dataset.resolution),
        "shuffle_caption": any(subset.shuffle_caption for subset in subsets),
        "flip_aug": any(subset.flip_aug for subset in subsets),
        "keep_tokens": max((subset.keep_tokens for subset in subsets), default=0),
        "dataset_dirs": _folder_counts(table, datasets, is_reg=False),
        "reg_dataset_dirs": _folder_counts(table, datasets, is_reg=True),
    }
    return metadata | {f"ss_{name}": value for name, value in options.items()}


_FLAT = (
    "batch_size_per_device",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_no_upscale",
    "bucket_info",
    "tag_frequency",
)


def _describe(table: RecordTable, plan: RunPlan, index: int, dataset: DatasetConfig) -> dict[str, Any]:
    """One dataset as an entry of `ss_datasets`."""
    per_epoch = {
        number: int(table.repeats[_members(table, index, number)].sum()) for number in range(len(dataset.subsets))
    }
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(per_epoch[n] for n, subset in enumerate(dataset.subsets) if not subset.is_reg),
        "num_reg_images": sum(per_epoch[n] for n, subset in enumerate(dataset.subsets) if subset.is_reg),
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso if dataset.enable_bucket else None,
        "max_bucket_reso": dataset.max_bucket_reso if dataset.enable_bucket else None,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "tag_frequency": _tag_frequency(table, index, dataset),
        "bucket_info": _bucket_info(table, plan, index) if dataset.enable_bucket else None,
        "subsets": [
            _describe_subset(subset, _report(table, index, number).images)
            for number, subset in enumerate(dataset.subsets)
        ],
    }


def _describe_subset(subset: SubsetConfig, images: int) -> dict[str, Any]:
    return {
        "img_count": images,
        "num_repeats": subset.num_repeats,
        "image_dir": subset.name,
        "class_tokens": subset.class_tokens or None,
        "is_reg": subset.is_reg,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "flip_aug": subset.flip_aug,
    }


def _bucket_info(table: RecordTable, plan: RunPlan, dataset: int) -> dict[str, Any]:
    """How many samples each bucket has per epoch, and the images' mean difference in aspect ratio from their bucket."""
    groups = [group for group in plan.groups if group.dataset == dataset]
    used = (table.subsets[:, 0] == dataset) & (table.repeats > 0)
    aspects, wanted = (column[used, 0] / column[used, 1] for column in (table.buckets, table.sizes))
    return {
        "buckets": {str(i): {"resolution": list(g.bucket), "count": g.samples} for i, g in enumerate(groups)},
        "mean_img_ar_error": float(np.abs(aspects - wanted).mean()) if used.any() else 0.0,
    }


def _tag_frequency(table: RecordTable, index: int, dataset: DatasetConfig) -> dict[str, dict[str, int]]:
    """By folder: in how many of its images' captions each comma-separated tag is."""
    frequency: dict[str, Counter[str]] = {}
    for number, subset in enumerate(dataset.subsets):
        counts = frequency.setdefault(subset.name, Counter())
        for record in _members(table, index, number):
            line = table.caption(record).partition("\n")[0]
            counts.update(tag.strip().lower() for tag in line.split(",") if tag.strip())
    return {folder: dict(counts) for folder, counts in frequency.items()}


def _folder_counts(table: RecordTable, datasets: Sequence[DatasetConfig], is_reg: bool) -> dict[str, dict[str, int]]:
    counts = {}
    for report in table.reports:
        subset = datasets[report.dataset].subsets[report.subset]
        if subset.is_reg == is_reg:
            counts[subset.name] = {"n_repeats": subset.num_repeats, "img_count": report.images}
    return counts


def _members(table: RecordTable, dataset: int, subset: int) -> np.ndarray:
    """The records of a subset."""
    return np.flatnonzero((table.subsets == (dataset, subset)).all(axis=1))


def _report(table: RecordTable, dataset: int, subset: int) -> SubsetReport:
    return next(report for report in table.reports if (report.dataset, report.subset) == (dataset, subset))


def _text_table(kind: type, rows: Sequence[Any]) -> str:
    """Columns in the order of the dataclass's fields, numbers to the right."""
    cells = [[field.name.replace("_", " ") for field in fields(kind)]] + [
        [str(v) for v in astuple(row)] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    left = [field.type in (str, "str") for field in fields(kind)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if is_left else text.rjust(w) for text, w, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    )
