"""The order of a run: laws of BatchPlan for any data, accumulation, process count and starting step."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from library.data.plan import PlanSampler, RunPlan
from library.data.records import RecordTable
from library.randomness import address, generator

BUCKETS = [(64, 64), (48, 80), (80, 48)]
PINNED = [
    [(1, 0), (3, 0)],
    [(5, 0), (1, 1)],
    [(4, 1), (2, 2)],
    [(2, 1), (2, 0)],
    [(0, 0), (4, 0)],
    [(5, 2), (5, 1)],
    [(1, 0), (1, 1)],
    [(2, 0), (0, 0)],
]


class FakeTable:
    """As much of a RecordTable as a plan reads: one record per (dataset, bucket, repeats)."""

    def __init__(self, records):
        self.records = records
        self.subsets = np.array([(dataset, 0) for dataset, _, _ in records])
        self.buckets = np.array([BUCKETS[bucket] for _, bucket, _ in records])
        self.repeats = np.array([repeats for _, _, repeats in records])

    by_bucket = RecordTable.by_bucket

    def key(self, index):
        return f"{self.subsets[index][0]}/0/{index}.png"


tables = (
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=12)
    .filter(lambda records: any(repeats for _, _, repeats in records))
    .map(FakeTable)
)
runs = st.tuples(tables, st.integers(1, 4), st.integers(1, 3))


def make(table, batch_sizes=(2, 3), *, seed=1, accumulation=1, world=1, rank=0):
    datasets = [SimpleNamespace(batch_size=size) for size in batch_sizes]
    return RunPlan(table, datasets, seed=seed, accumulation=accumulation, world=world, rank=rank)


def steps_of(plans):
    grouped = {}
    for plan in plans:
        grouped.setdefault(plan.step, []).append(plan)
    return list(grouped.values())


@given(runs)
def test_an_epoch_uses_every_image_as_often_as_it_is_repeated(run):
    table, accumulation, _ = run
    plan = make(table, accumulation=accumulation)
    for epoch in range(2):
        batches = list(plan.iterate(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch))
        uses = Counter((item.record, item.repeat) for batch in batches for item in batch.items)
        expected = [(record, use) for record, (_, _, n) in enumerate(table.records) for use in range(n)]
        assert uses == Counter(expected)
        assert len(batches) == plan.batches_per_epoch
        assert {batch.epoch for batch in batches} == {epoch + 1}


@given(runs)
def test_counts_are_ceilings_per_bucket(run):
    table, accumulation, world = run
    plan = make(table, accumulation=accumulation, world=world)
    counts = Counter()
    for dataset, bucket, repeats in table.records:
        counts[dataset, bucket] += repeats
    batches = sum(-(-count // (2, 3)[dataset]) for (dataset, _), count in counts.items())
    assert plan.images_per_epoch == sum(counts.values())
    assert plan.batches_per_epoch == batches
    assert plan.steps_per_epoch == math.ceil(math.ceil(batches / world) / accumulation)


@given(runs)
def test_batches_are_of_one_dataset_and_bucket(run):
    table, accumulation, _ = run
    plan = make(table, accumulation=accumulation)
    for batch in plan.iterate(0, plan.steps_per_epoch):
        assert 1 <= len(batch.items) <= (2, 3)[batch.dataset]
        for item in batch.items:
            assert tuple(table.buckets[item.record]) == batch.bucket
            assert table.subsets[item.record][0] == batch.dataset
            assert item.seed == address(1, batch.epoch, table.key(item.record), item.repeat)


@given(runs)
def test_steps_end_with_their_epoch_and_average_over_what_is_there(run):
    table, accumulation, world = run
    plans = [make(table, accumulation=accumulation, world=world, rank=rank) for rank in range(world)]
    by_rank = [steps_of(plan.iterate(0, 2 * plan.steps_per_epoch)) for plan in plans]
    assert len({len(steps) for steps in by_rank}) == 1
    for number, step in enumerate(zip(*by_rank, strict=True)):
        assert len({len(micros) for micros in step}) == 1, "collectives would not match"
        everything = [batch for micros in step for batch in micros]
        real = [batch for batch in everything if not batch.filler]
        assert {batch.step for batch in everything} == {number}
        assert len({batch.epoch for batch in everything}) == 1
        assert {batch.images_in_step for batch in everything} == {sum(len(batch.items) for batch in real)}
        assert {batch.last_of_epoch for batch in everything} == {(number + 1) % plans[0].steps_per_epoch == 0}
        for micros in step:
            assert [batch.micro for batch in micros] == list(range(len(micros)))
            assert [batch.last_micro for batch in micros] == [False] * (len(micros) - 1) + [True]
            assert len(micros) <= accumulation


@given(runs)
def test_several_processes_do_what_one_does_with_more_accumulation(run):
    table, accumulation, world = run
    alone = make(table, accumulation=accumulation * world)
    ranks = [make(table, accumulation=accumulation, world=world, rank=rank) for rank in range(world)]
    last = 2 * alone.steps_per_epoch
    assert ranks[0].steps_per_epoch == alone.steps_per_epoch
    together = zip(*(rank.iterate(0, last) for rank in ranks), strict=True)
    merged = [batch for micros in together for batch in micros if not batch.filler]
    single = list(alone.iterate(0, last))
    assert [(b.step, b.items, b.images_in_step) for b in merged] == [
        (b.step, b.items, b.images_in_step) for b in single
    ]


@given(runs, st.integers(0, 30), st.integers(0, 10))
def test_starting_anywhere_gives_the_same_tail(run, start, length):
    table, accumulation, world = run
    plan = make(table, accumulation=accumulation, world=world, rank=world - 1)
    whole = [batch for batch in plan.iterate(0, start + length) if batch.step >= start]
    again = make(table, accumulation=accumulation, world=world, rank=world - 1)
    assert list(PlanSampler(again, start, start + length)) == whole


def test_orders_differ_between_epochs_and_seeds():
    table = FakeTable([(0, n % 3, 3) for n in range(12)])

    def order(seed, epoch):
        plan = make(table, seed=seed)
        return [
            item.record
            for batch in plan.iterate(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
            for item in batch.items
        ]

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[1]


@pytest.mark.parametrize("buckets", [1, 3])
def test_samples_and_batches_are_both_shuffled(buckets):
    table = FakeTable([(0, n % buckets, 1) for n in range(60)])
    first = list(make(table).iterate(0, 30))
    assert [item.record for batch in first for item in batch.items] != sorted(range(60))
    if buckets > 1:
        assert [batch.bucket for batch in first] != sorted(batch.bucket for batch in first)


def test_whole_repeats_keep_their_order_from_version_to_version():
    table = FakeTable([(0, n % 2, 1 + n % 3) for n in range(6)])
    order = [[(item.record, item.repeat) for item in batch.items] for batch in make(table).iterate(0, 8)]
    assert order == PINNED


class TestBrokenRepeats:
    """Repeats that are no whole numbers."""

    subsets = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # buckets of its images

    def table(self, *parts):
        """One subset per part, of (buckets, repeats)."""
        table = FakeTable([(0, bucket, repeats) for buckets, repeats in parts for bucket in buckets])
        table.subsets[:, 1] = np.repeat(np.arange(len(parts)), [len(buckets) for buckets, _ in parts])
        table.repeats = table.repeats.astype(float)
        return table

    def epochs(self, plan, count):
        for epoch in range(count):
            yield list(plan.iterate(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch))

    @given(subsets, st.floats(0.01, 3.5), subsets, st.integers(1, 4))
    @example([0] * 10, 0.15, [0], 1)  # whose sum is not their product
    def test_every_epoch_has_as_many_of_each_subset(self, first, repeats, second, whole):
        table = self.table((first, repeats), (second, whole))
        plan = make(table)
        for batches in self.epochs(plan, 4):
            items = [item for batch in batches for item in batch.items]
            assert len({(item.record, item.repeat) for item in items}) == len(items) == plan.images_per_epoch
            assert len(batches) == plan.batches_per_epoch
            counts = Counter(int(table.subsets[item.record, 1]) for item in items)
            assert counts == {0: max(round(len(first) * repeats), 1), 1: len(second) * whole}
            for batch in batches:
                assert {tuple(table.buckets[item.record]) for item in batch.items} == {batch.bucket}

    @given(subsets, st.floats(0.01, 2.5))
    def test_images_of_a_bucket_take_turns(self, buckets, repeats):
        table = self.table((buckets, repeats))
        plan = make(table)
        uses = Counter(dict.fromkeys(range(len(buckets)), 0))
        for batches in self.epochs(plan, 3 * len(buckets)):
            uses.update(item.record for batch in batches for item in batch.items)
        assert min(uses.values()) > 0, "an image that no epoch uses"
        for bucket in set(buckets):
            counts = [uses[record] for record, own in enumerate(buckets) if own == bucket]
            assert max(counts) - min(counts) <= 1

    def test_two_and_a_half(self):
        plan = make(self.table(([0] * 4, 2.5)))
        first, second = ([i.record for batch in batches for i in batch.items] for batches in self.epochs(plan, 2))
        assert sorted(Counter(first).values()) == [2, 2, 3, 3]
        assert Counter(first + second) == dict.fromkeys(range(4), 5)

    def test_a_use_more_in_one_bucket_joins_its_batches(self):
        plan = make(self.table(([0] * 3, 1.3)))
        assert (plan.images_per_epoch, plan.batches_per_epoch, plan.loose) == (4, 2, ())

    def test_few_images_among_many_get_their_turn(self):
        plan = make(self.table(([0] * 100 + [1, 2], 0.1)))
        assert [group.samples for group in plan.groups] == [9]
        assert [group.samples for group in plan.loose] == [1]
        assert plan.images_per_epoch == 10
        seen = {i.record for batches in self.epochs(plan, 2) for batch in batches for i in batch.items}
        assert {100, 101} <= seen

    @given(subsets, st.floats(0.01, 2.5), st.integers(0, 60), st.integers(0, 6))
    def test_starting_anywhere_gives_the_same_tail(self, buckets, repeats, start, length):
        table = self.table((buckets, repeats))
        whole = [batch for batch in make(table).iterate(0, start + length) if batch.step >= start]
        assert list(make(table).iterate(start, start + length)) == whole

    def test_a_late_start_costs_no_more_than_an_early_one(self, monkeypatch):
        drawn = []

        def counting(*parts):
            drawn.append(parts)
            return generator(*parts)

        monkeypatch.setattr("library.data.plan.generator", counting)
        plan = make(self.table(([0] * 10, 0.3)))
        for start in (0, 10**9):
            drawn.clear()
            next(plan.iterate(start, start + 1))
            assert len(drawn) <= 4
