"""Which images each training step sees: the whole run's batches as a function of (seed, step). No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.buckets import Size
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.data.scanning.scan import uses_per_epoch
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
class Turns:
    """Images of which each epoch uses `per_epoch` once more than the whole part of their repeats: others each time.

    The epochs take their shares, one after the other, of an endless sequence of shuffled rounds of all of them.
    """

    members: np.ndarray
    """(n,) records"""
    uses: np.ndarray
    """(n,) how often each is used anyway"""
    per_epoch: int
    address: tuple[int | str, ...]
    """What its rounds are shuffled by, with the seed and the number of the round."""

    def share(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Records (per_epoch,) in the epoch's share, and which use of each it is."""
        start, stop = (epoch - 1) * self.per_epoch, epoch * self.per_epoch
        count = len(self.members)
        rounds = range(start // count, -(-stop // count))
        sequence = [generator(seed, "turns", *self.address, number).permutation(count) for number in rounds]
        chosen = np.concatenate(sequence)[start - rounds[0] * count : stop - rounds[0] * count]
        ends = rounds[0] * count + count - start  # what lies beyond belongs to the next round
        again = np.arange(len(chosen)) >= ends
        again &= np.isin(chosen, chosen[:ends])
        return self.members[chosen], self.uses[chosen] + again


@dataclass(frozen=True)
class Group:
    """The images of one dataset and bucket, from which batches are made."""

    dataset: int
    bucket: Size | None
    """None: each batch has its own"""
    batch_size: int
    records: np.ndarray
    """(fixed samples,) record of each use that every epoch has"""
    uses: np.ndarray
    """(fixed samples,) which use of its record it is"""
    turns: tuple[Turns, ...] = ()
    """What the epochs take turns with."""

    @property
    def samples(self) -> int:
        """Images per epoch."""
        return len(self.records) + sum(turns.per_epoch for turns in self.turns)

    @property
    def batches(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-self.samples // self.batch_size)

    @property
    def members(self) -> np.ndarray:
        """The records that any epoch uses."""
        return np.unique(np.concatenate([self.records, *(turns.members for turns in self.turns)]))

    def epoch(self, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Records (samples,) of one epoch, not shuffled, and which use of each it is."""
        if not self.turns:
            return self.records, self.uses
        shares = [turns.share(number, seed) for turns in self.turns]
        return tuple(np.concatenate(columns) for columns in zip((self.records, self.uses), *shares, strict=True))


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
        self.groups, self.loose = _groups(table, datasets)
        """`loose`: images in turn that are too few in their buckets for one per epoch, each a batch of its own"""
        sources = (*self.groups, *self.loose)
        self.images_per_epoch = sum(source.samples for source in sources)
        self.batches_per_epoch = sum(source.batches for source in sources)
        self.steps_per_epoch = -(-self.batches_per_epoch // (accumulation * world))

    def iterate(self, start_step: int, stop_step: int) -> Iterator[BatchPlan]:
        """The micro-batches of this process in steps `start_step` to `stop_step` (excluded), in order."""
        epoch = None
        for step in range(start_step, stop_step):
            if epoch is None or epoch.number != step // self.steps_per_epoch + 1:
                epoch = _Epoch(step // self.steps_per_epoch + 1, (*self.groups, *self.loose), self.seed)
            yield from self._step(epoch, step)

    def largest_batch(self) -> BatchPlan:
        """A micro-batch with as many pixels as any, the same one for all processes, as a step of its own."""
        chosen, most = None, 0
        for group in (*self.groups, *self.loose):
            sizes = [group.bucket] if group.bucket else self.table.buckets[group.members].tolist()
            for index, (width, height) in enumerate(sizes):
                pixels = min(group.batch_size, group.samples) * width * height
                if pixels > most:
                    records = group.epoch(1, self.seed) if group.bucket else ([group.members[index]], [0])
                    chosen, most = (group, (width, height), records), pixels
        group, bucket, (records, uses) = chosen
        uses_of_batch = list(zip(records, uses, strict=True))[: group.batch_size]
        items = tuple(self._item(1, int(record), int(use)) for record, use in uses_of_batch)
        return BatchPlan(
            epoch=1,
            step=0,
            micro=0,
            last_micro=True,
            items=items,
            bucket=bucket,
            dataset=group.dataset,
            images_in_step=len(items) * self.world,
            filler=False,
            last_of_epoch=False,
        )

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
                bucket=group.bucket or tuple(self.table.buckets[records[0]].tolist()),
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
        self.samples = [_shuffled(group, number, seed) for group in groups]
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
        chosen = slice(batch * group.batch_size, (batch + 1) * group.batch_size)
        records, uses = self.samples[index]
        return group, records[chosen].tolist(), uses[chosen].tolist()


def _shuffled(group: Group, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Records (samples,) of one epoch in their order, and which use of each it is."""
    records, uses = group.epoch(epoch, seed)
    order = generator(seed, epoch, "samples", group.dataset, *(group.bucket or ())).permutation(group.samples)
    return records[order], uses[order]


def _groups(table: RecordTable, datasets: Sequence[DatasetConfig]) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """One group per dataset and bucket that has samples in every epoch, and one per subset with loose images."""
    buckets = list(table.by_bucket())
    turns, loose = _turns(table, buckets)
    groups = []
    for dataset, bucket, members in buckets:
        whole = table.repeats[members].astype(np.int64)
        first = np.repeat(np.cumsum(whole) - whole, whole)
        group = Group(
            dataset=dataset,
            bucket=bucket,
            batch_size=datasets[dataset].batch_size,
            records=np.repeat(members, whole),
            uses=np.arange(len(first)) - first,
            turns=tuple(turns.get((dataset, bucket), ())),
        )
        groups += [group] if group.samples else []
    nothing = np.empty(0, dtype=np.int64)
    return tuple(groups), tuple(Group(dataset, None, 1, nothing, nothing, (rest,)) for dataset, rest in loose)


def _turns(
    table: RecordTable, buckets: Sequence[tuple[int, Size, np.ndarray]]
) -> tuple[dict[tuple[int, Size], list[Turns]], list[tuple[int, Turns]]]:
    """What takes turns because of broken repeats: by dataset and bucket, and by dataset what is loose."""
    rests: dict[tuple[int, int], dict[Size, np.ndarray]] = {}
    for dataset, bucket, members in buckets:
        broken = members[table.repeats[members] % 1 > 0]
        subsets = table.subsets[broken, 1]
        for subset in np.unique(subsets).tolist():
            rests.setdefault((dataset, subset), {})[bucket] = broken[subsets == subset]
    turns: dict[tuple[int, Size], list[Turns]] = {}
    loose: list[tuple[int, Turns]] = []
    for (dataset, subset), members_of in rests.items():
        repeats = table.repeats[np.concatenate(list(members_of.values()))]
        total = uses_per_epoch(repeats) - int(repeats.astype(np.int64).sum())
        counts, of_loose = _seats([float((table.repeats[m] % 1).sum()) for m in members_of.values()], total)
        for (bucket, members), count in zip(members_of.items(), counts, strict=True):
            if count:
                whole = table.repeats[members].astype(np.int64)
                turn = Turns(members, whole, count, (dataset, subset, *bucket))
                turns.setdefault((dataset, bucket), []).append(turn)
        if of_loose:
            members = np.concatenate([m for m, n in zip(members_of.values(), counts, strict=True) if not n])
            whole = table.repeats[members].astype(np.int64)
            loose.append((dataset, Turns(members, whole, of_loose, (dataset, subset, "loose"))))
    return turns, loose


def _seats(wanted: Sequence[float], total: int) -> tuple[list[int], int]:
    """How many of `total` uses per epoch each bucket gets, by largest remainders, and how many are loose.

    The number must not change from epoch to epoch. So buckets that want less than one use per epoch share at least one,
    or some of their images would never be used; all buckets share where none has more than one to give away.
    """
    small = [want < 1 - 1e-9 for want in wanted]
    claims = [0.0 if is_small else want for want, is_small in zip(wanted, small, strict=True)]
    claims.append(sum(want for want, is_small in zip(wanted, small, strict=True) if is_small))
    counts = [int(claim + 1e-9) for claim in claims]
    order = sorted(range(len(claims)), key=lambda number: counts[number] - claims[number])
    for number in order[: max(total - sum(counts), 0)]:
        counts[number] += 1
    if any(small) and total and not counts[-1]:
        richest = max(range(len(wanted)), key=counts.__getitem__)
        if counts[richest] < 2:
            return [0] * len(wanted), total
        counts[richest], counts[-1] = counts[richest] - 1, 1
    of_small = counts.pop()
    if sum(small) == 1:  # it shares with nobody
        counts[small.index(True)], of_small = of_small, 0
    return counts, of_small
