"""Which images each training step sees: the whole run's batches as a function of (seed, step). No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.buckets import Size
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.randomness import address, generator


@dataclass(frozen=True, slots=True)
class Item:
    """One use of an image."""

    record: int
    repeat: int
    """Which use within the epoch, from 0."""
    seed: int
    """Where the random choices of this use start from."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One micro-batch of one process."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer step of the run, from 0."""
    micro: int
    """Index within the step on this process."""
    last_micro: bool
    """Whether the optimizer steps after this one."""
    items: tuple[Item, ...]
    bucket: Size
    dataset: int
    images_in_step: int
    """Images of the step in all its micro-batches on all processes: what the loss is averaged over."""
    filler: bool
    """Stands in where this process has no micro-batch while others have one; its images weigh nothing."""
    last_of_epoch: bool
    """Whether the step is the last of its epoch."""


@dataclass(frozen=True)
class Group:
    """The images of one dataset and bucket, from which batches are made."""

    dataset: int
    bucket: Size
    batch_size: int
    records: np.ndarray
    """(samples,) record of each use"""
    uses: np.ndarray
    """(samples,) which use of its record it is"""

    @property
    def samples(self) -> int:
        """Images per epoch."""
        return len(self.records)

    @property
    def batches(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-self.samples // self.batch_size)


class RunPlan:
    """The batches of a run for one of `world` processes.

    The batches of an epoch form one list. Micro-batch `a` of the epoch's step `k` is, for process `rank`, number
    `(k * accumulation + a) * world + rank` of it, so two processes do what one does with twice the accumulation. A step
    never takes batches of two epochs: at an epoch's end it has fewer.
    """

    def __init__(
        self,
        table: RecordTable,
        datasets: Sequence[DatasetConfig],
        *,
        seed: int,
        accumulation: int = 1,
        world: int = 1,
        rank: int = 0,
    ):
        self.table = table
        self.seed = seed
        self.accumulation = accumulation
        self.world = world
        self.rank = rank
        self.groups = tuple(_groups(table, datasets))
        self.images_per_epoch = sum(group.samples for group in self.groups)
        self.batches_per_epoch = sum(group.batches for group in self.groups)
        self.steps_per_epoch = -(-self.batches_per_epoch // (accumulation * world))

    def iterate(self, start_step: int, stop_step: int) -> Iterator[BatchPlan]:
        """The micro-batches of this process in steps `start_step` to `stop_step` (excluded), in order."""
        epoch = None
        for step in range(start_step, stop_step):
            if epoch is None or epoch.number != step // self.steps_per_epoch + 1:
                epoch = _Epoch(step // self.steps_per_epoch + 1, self.groups, self.seed)
            yield from self._step(epoch, step)

    def _step(self, epoch: "_Epoch", step: int) -> Iterator[BatchPlan]:
        index = step % self.steps_per_epoch
        slots = self.accumulation * self.world
        start, stop = index * slots, min((index + 1) * slots, self.batches_per_epoch)
        images = sum(epoch.length(number) for number in range(start, stop))
        micros = -(-(stop - start) // self.world)
        for micro in range(micros):
            number = start + micro * self.world + self.rank
            filler = number >= stop
            group, records, uses = epoch.batch(start if filler else number)
            yield BatchPlan(
                epoch=epoch.number,
                step=step,
                micro=micro,
                last_micro=micro == micros - 1,
                items=tuple(self._item(epoch.number, record, use) for record, use in zip(records, uses, strict=True)),
                bucket=group.bucket,
                dataset=group.dataset,
                images_in_step=images,
                filler=filler,
                last_of_epoch=index == self.steps_per_epoch - 1,
            )

    def _item(self, epoch: int, record: int, use: int) -> Item:
        return Item(record, use, address(self.seed, epoch, self.table.key(record), use))


class PlanSampler:
    """The plans of a range of steps as an iterable for a DataLoader: `DataLoader(sampler=..., batch_size=None)`."""

    def __init__(self, plan: RunPlan, start_step: int, stop_step: int):
        self.plan = plan
        self.start_step = start_step
        self.stop_step = stop_step

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.plan.iterate(self.start_step, self.stop_step)


class _Epoch:
    """The order of one epoch: samples shuffled within their group and cut into batches, and the batches shuffled."""

    def __init__(self, number: int, groups: Sequence[Group], seed: int):
        self.number = number
        self.groups = groups
        self.orders = [
            generator(seed, number, "samples", group.dataset, *group.bucket).permutation(group.samples)
            for group in groups
        ]
        batches = np.concatenate(
            [np.stack([np.full(g.batches, i), np.arange(g.batches)], 1) for i, g in enumerate(groups)]
        )
        self.batches = generator(seed, number, "batches").permutation(batches)
        """(batches, 2) group and which of its batches"""

    def length(self, number: int) -> int:
        """How many images the epoch's batch of this number has."""
        index, batch = self.batches[number].tolist()
        group = self.groups[index]
        return min(group.batch_size, group.samples - batch * group.batch_size)

    def batch(self, number: int) -> tuple[Group, list[int], list[int]]:
        """The group of the epoch's batch of this number, and its records and their uses."""
        index, batch = self.batches[number].tolist()
        group = self.groups[index]
        chosen = self.orders[index][batch * group.batch_size : (batch + 1) * group.batch_size]
        return group, group.records[chosen].tolist(), group.uses[chosen].tolist()


def _groups(table: RecordTable, datasets: Sequence[DatasetConfig]) -> Iterator[Group]:
    """One group per dataset and bucket that has images."""
    for dataset, bucket, members in table.by_bucket():
        repeats = table.repeats[members]
        first = np.repeat(np.cumsum(repeats) - repeats, repeats)
        yield Group(
            dataset=dataset,
            bucket=bucket,
            batch_size=datasets[dataset].batch_size,
            records=np.repeat(members, repeats),
            uses=np.arange(len(first)) - first,
        )
