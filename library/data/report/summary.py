"""The datasets in numbers: the table shown before training."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import numpy as np

from library.data import images
from library.data.config import DatasetConfig
from library.data.plan import Group, RunPlan
from library.data.records import RecordTable, SubsetReport
from library.data.report import tables
from library.data.report.metadata_facts import members, uses_of_subset
from library.data.scanning.wording import counted
from library.errors import some

MASKS_LOOKED_AT = 200  # of each subset: enough for a mean, and soon read
_BUCKETS_SHOWN = 20
_SMALL_BUCKETS_NAMED = 5
_WORLDS = (1, 2, 4)  # numbers of processes worth comparing


@dataclass(frozen=True)
class FolderRow:
    """One subset in the table before training."""

    dataset: int
    folder: str
    kind: str
    """`train`, `preserved` or `reg`, for regularisation."""
    images: int
    repeats: float
    per_epoch: int
    """Times that images of it are used per epoch."""
    no_caption: int
    broken: int
    too_small: int
    held_out: int
    animated: int
    upscaled: int
    aspect_error: float
    """Mean of |bucket aspect - image aspect|."""


@dataclass(frozen=True)
class RegularisationRow:
    """The regularisation images of one dataset."""

    dataset: int
    regularisation: str
    images: int
    used: int
    """How many of them are used at all."""
    uses_per_epoch: int
    unused: int


@dataclass(frozen=True)
class MaskRow:
    """The masks of one subset: files of their own, or the images' transparency."""

    dataset: int
    masks: str
    found: int | None
    """None: only the images' transparency, which is not looked for beforehand."""
    no_mask: int
    """Images without one."""
    no_image: int
    """Masks of no image."""
    wrong_size: int
    """Masks of other proportions than their images."""
    looked_at: int
    mean_area: str
    """Share of the images that is trained on, of the masks looked at."""
    all_zero: int
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
    batch_sizes: str
    """`3x4 1x2`: three batches of four images and one of two."""


@dataclass(frozen=True)
class SmallBucket:
    """A bucket that does not fill half a batch: what it would take is to crop or replace its images."""

    dataset: int
    bucket: str
    per_epoch: int
    batch_size: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class ProcessRow:
    """The run on a number of processes."""

    processes: str
    global_batch: str
    """Images per optimizer step."""
    steps_per_epoch: int
    steps: int
    epochs: float
    images_seen: int


@dataclass(frozen=True)
class Summary:
    """What will be trained on."""

    folders: tuple[FolderRow, ...]
    regularisation: tuple[RegularisationRow, ...]
    masks: tuple[MaskRow, ...]
    buckets: tuple[BucketRow, ...]
    small_buckets: tuple[SmallBucket, ...]
    processes: tuple[ProcessRow, ...]
    held_out: int
    images_per_epoch: int
    batches_per_epoch: int
    steps_per_epoch: int

    def __str__(self) -> str:
        """Plain text: a table for each kind of rows, and lines of totals. At most 100 columns wide."""
        return "\n\n".join([*(tables.text(rows) for _, rows in self.sections()), "\n".join(self.lines())])

    def markdown(self) -> str:
        """The same as Markdown, as TensorBoard shows texts."""
        sections = [f"**{title}**\n\n{tables.markdown(rows)}" for title, rows in self.sections()]
        return "\n\n".join([*sections, "\n".join(f"- {line}" for line in self.lines())])

    def sections(self) -> list[tuple[str, Sequence[Any]]]:
        """The tables that have rows, with a title each; of many buckets the largest."""
        titled = [
            ("Image folders", self.folders),
            ("Regularisation images", self.regularisation),
            ("Masks", self.masks),
            ("Buckets", _largest(self.buckets)),
            ("Processes", self.processes),
        ]
        return [(title, rows) for title, rows in titled if rows]

    def lines(self) -> list[str]:
        """What is said in sentences: buckets that do not fill half a batch, and totals."""
        lines = [
            f"{row.bucket} is less than half a batch of {row.batch_size}: {some(row.files)}"
            for row in self.small_buckets[:_SMALL_BUCKETS_NAMED]
        ]
        rest = len(self.small_buckets) - _SMALL_BUCKETS_NAMED
        if rest > 0:
            lines.append("so is 1 more bucket" if rest == 1 else f"so are {rest} more buckets")
        if self.held_out:
            lines.append(f"held out for validation: {counted(self.held_out, 'image', 'images')}")
        return [
            *lines,
            f"per epoch: {counted(self.images_per_epoch, 'image', 'images')} in "
            f"{counted(self.batches_per_epoch, 'batch', 'batches')}, "
            f"{counted(self.steps_per_epoch, 'optimizer step', 'optimizer steps')}",
        ]


def summarise(
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    plan: RunPlan,
    total_steps: Callable[[int], int] | None = None,
) -> Summary:
    """The rows of the table before training.

    `total_steps` gives the optimizer steps of the run for a number of steps per epoch; without it nothing is said of
    numbers of processes. A few of the masks are decoded.
    """
    return Summary(
        folders=tuple(_folder(table, datasets, report) for report in table.reports),
        regularisation=tuple(_regularisation(table, datasets)),
        masks=tuple(_masks(table, datasets)),
        buckets=tuple(
            BucketRow(
                group.dataset,
                _name(group),
                len(group.members),
                group.samples,
                group.batches,
                _batch_sizes(group),
            )
            for group in (*plan.groups, *plan.loose)
        ),
        small_buckets=tuple(
            SmallBucket(group.dataset, _name(group), group.samples, group.batch_size, _files(table, group))
            for group in plan.groups
            if 2 * group.samples < group.batch_size
        ),
        processes=tuple(_processes(datasets, plan, total_steps)) if total_steps else (),
        held_out=sum(report.held_out for report in table.reports),
        images_per_epoch=plan.images_per_epoch,
        batches_per_epoch=plan.batches_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
    )


def _folder(table: RecordTable, datasets: Sequence[DatasetConfig], report: SubsetReport) -> FolderRow:
    subset = datasets[report.dataset].subsets[report.subset]
    per_epoch = uses_of_subset(table, report.dataset, report.subset)
    return FolderRow(
        dataset=report.dataset,
        folder=subset.name,
        kind="reg" if subset.is_reg else "preserved" if subset.is_preserved else "train",
        images=report.images,
        repeats=subset.num_repeats if subset.images_per_epoch is None else per_epoch / max(report.images, 1),
        per_epoch=per_epoch,
        no_caption=report.captions_missing,
        broken=len(report.broken),
        too_small=report.skipped_small,
        held_out=report.held_out,
        animated=report.animated,
        upscaled=report.upscaled,
        aspect_error=report.aspect_error,
    )


def _regularisation(table: RecordTable, datasets: Sequence[DatasetConfig]) -> Iterator[RegularisationRow]:
    for index, dataset in enumerate(datasets):
        numbers = [number for number, subset in enumerate(dataset.subsets) if subset.is_reg]
        if not numbers:
            continue
        repeats = np.concatenate([table.repeats[members(table, index, number)] for number in numbers])
        used = int(np.count_nonzero(repeats))
        names = some([dataset.subsets[number].name for number in numbers], 1)
        uses = sum(uses_of_subset(table, index, number) for number in numbers)
        yield RegularisationRow(index, names, len(repeats), used, uses, len(repeats) - used)


def _masks(table: RecordTable, datasets: Sequence[DatasetConfig]) -> Iterator[MaskRow]:
    for report in table.reports:
        subset = datasets[report.dataset].subsets[report.subset]
        if subset.conditioning_data_dir is None and not subset.images.alpha_mask:
            continue
        records = members(table, report.dataset, report.subset)
        with ThreadPoolExecutor(max_workers=8) as pool:
            areas = pool.map(partial(_mask_area, table, subset.images), _sample(records))
            areas = [area for area in areas if area is not None]
        known = [area for area in areas if not np.isnan(area)]
        yield MaskRow(
            dataset=report.dataset,
            masks=subset.name,
            found=None if subset.conditioning_data_dir is None else report.masks_found,
            no_mask=report.masks_missing,
            no_image=report.stray_masks,
            wrong_size=report.masks_wrong_size,
            looked_at=len(areas),
            mean_area=f"{np.mean(known):.0%}" if known else "",
            all_zero=sum(area == 0 for area in known),
            unreadable=len(areas) - len(known),
        )


def _sample(records: np.ndarray) -> list[int]:
    count = min(len(records), MASKS_LOOKED_AT)
    return records[np.linspace(0, len(records) - 1, count).astype(int)].tolist() if count else []


def _mask_area(table: RecordTable, options: images.ImageOptions, index: int) -> float | None:
    """The mean of an image's mask; None where it has none, NaN where it cannot be read."""
    record = table[index]
    try:
        if record.mask:
            return float(images.load_mask(record.mask).mean())
        alpha = images.load(record.path, options)[1] if options.alpha_mask else None
        return None if alpha is None else float(alpha.mean()) / 255
    except images.BrokenImage:
        return float("nan")


def _name(group: Group) -> str:
    return f"{group.bucket[0]}x{group.bucket[1]}" if group.bucket else "rare sizes"


def _batch_sizes(group: Group) -> str:
    full, rest = divmod(group.samples, group.batch_size)
    return " ".join([f"{full}x{group.batch_size}"] * bool(full) + [f"1x{rest}"] * bool(rest))


def _files(table: RecordTable, group: Group) -> tuple[str, ...]:
    return tuple(os.path.basename(table[index].path) for index in group.members.tolist())


def _processes(
    datasets: Sequence[DatasetConfig], plan: RunPlan, total_steps: Callable[[int], int]
) -> Iterator[ProcessRow]:
    sizes = sorted({dataset.batch_size for dataset in datasets})
    for world in sorted({*_WORLDS, plan.world}):
        slots = plan.accumulation * world
        steps_per_epoch = -(-plan.batches_per_epoch // slots)
        steps = total_steps(steps_per_epoch)
        epochs = steps / steps_per_epoch
        yield ProcessRow(
            processes=f"{world} (this run)" if world == plan.world else str(world),
            global_batch="–".join(str(sizes[i] * slots) for i in sorted({0, len(sizes) - 1})),
            steps_per_epoch=steps_per_epoch,
            steps=steps,
            epochs=round(epochs, 2),
            images_seen=round(epochs * plan.images_per_epoch),
        )


def _largest(rows: Sequence[BucketRow]) -> Sequence[BucketRow]:
    """The rows in their order, of many only those with the most images, and one row for the others."""
    if len(rows) <= _BUCKETS_SHOWN:
        return rows
    order = sorted(range(len(rows)), key=lambda i: -rows[i].per_epoch)
    shown, others = sorted(order[: _BUCKETS_SHOWN - 1]), [rows[i] for i in order[_BUCKETS_SHOWN - 1 :]]
    sums = (sum(values) for values in zip(*(astuple(row)[2:5] for row in others), strict=True))
    return [*(rows[i] for i in shown), BucketRow(0, f"{len(others)} others", *sums, "")]
