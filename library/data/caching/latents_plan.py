"""Which latents a run needs, which of them are on the disk, and in which groups the others are made. Needs no model."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from library.bars import progress_bar
from library.console import notice, rank
from library.data.buckets import Buckets
from library.data.caching import latents_file
from library.data.caching.latents_file import Finding, LatentsLayout, Recipe, State
from library.data.config import DatasetConfig
from library.data.records import RecordTable, geometry_of

_CHECKED_AT_A_TIME = 256
_CHECKERS = 8  # threads: they mostly wait for the disk


@dataclass(frozen=True)
class LatentsPlan:
    """What a run needs of latents, and what of it is on the disk."""

    table: RecordTable
    datasets: Sequence[DatasetConfig]
    layout: LatentsLayout
    states: np.ndarray
    """(N,) State of each record"""
    to_disk: bool
    """Whether what is missing is to be kept in files beside the images."""
    mirrored: np.ndarray
    """(N,) whether some use of the same file needs mirrored latents in it"""
    elsewhere: np.ndarray
    """(N,) whether the image's file keeps what an earlier use makes of it with other settings: each run makes these"""
    anew: bool = False
    """Whether what is missing is made even where a file that fits is there."""

    @property
    def missing(self) -> int:
        """How many images have to be encoded: if none has, no autoencoder is needed."""
        return int(np.count_nonzero(self.states == State.MISSING))

    @cached_property
    def _buckets(self) -> list[Buckets]:
        return [dataset.buckets() for dataset in self.datasets]

    def recipe(self, index: int) -> Recipe:
        """How the latents of a record are made."""
        record = self.table[index]
        options = self.datasets[record.dataset].subsets[record.subset].images
        if self.mirrored[index]:
            options = replace(options, flip_aug=True)
        geometry = geometry_of(record, self._buckets[record.dataset])
        return Recipe(record, geometry, options, self.layout, self.table.predefined(record.dataset))

    def groups(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        """The records that are encoded together, up to `batch_size` of one bucket: this process's share of the groups.

        They are a function of the table, not of what is missing: what a VAE makes of an image differs in the last bits
        with the size of the batch.
        """
        number = 0
        for _, _, members in self.table.by_bucket(np.flatnonzero(self.states != State.UNUSED)):
            for start in range(0, len(members), batch_size):
                if number % world == rank:
                    yield members[start : start + batch_size]
                number += 1


def plan_latents(
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    layout: LatentsLayout,
    *,
    to_disk: bool = False,
    skip_check: bool = False,
    recache_unknown: bool = False,
    anew: bool = False,
) -> LatentsPlan:
    """Looks which latents are there already.

    Files beside the images count with `to_disk`, and for datasets whose metadata says at which size each image's
    latents were made. `skip_check`: a file with arrays of the right names and sizes is enough. `recache_unknown`: files
    that do not tell which autoencoder they are from are made again where the image is still there. `anew`: no file
    counts, so that all are made again.
    """
    used = (table.repeats > 0) | table.validation
    states = np.where(used, State.MISSING, State.UNUSED).astype(np.uint8)
    with_files = np.array([to_disk or table.predefined(number) for number in range(len(datasets))])
    plan = LatentsPlan(table, datasets, layout, states, to_disk, np.zeros_like(used), np.zeros_like(used), anew)
    if to_disk:
        _share_files(plan)
    if anew:
        return plan
    sought = np.flatnonzero(used & with_files[table.subsets[:, 0]] & ~plan.elsewhere)

    def look(indices: np.ndarray) -> list[Finding]:
        recipes = map(plan.recipe, indices.tolist())
        if skip_check:
            return [Finding(State.VALID if latents_file.exists(recipe) else State.MISSING) for recipe in recipes]
        return [latents_file.judge(recipe) for recipe in recipes]

    flaws: Counter[str] = Counter()

    parts = [sought[start : start + _CHECKED_AT_A_TIME] for start in range(0, len(sought), _CHECKED_AT_A_TIME)]
    bar = progress_bar(total=len(sought), desc="checking latents", unit="img", delay=1, leave=False, disable=rank() > 0)
    with bar, ThreadPoolExecutor(_CHECKERS) as pool:
        for part, found in zip(parts, pool.map(look, parts), strict=True):
            states[part] = [finding.state for finding in found]
            flaws.update(finding.flaw for finding in found if finding.flaw)
            if to_disk and rank() == 0:
                _note_times(plan, part, found)
            bar.update(len(part))
    if flaws:
        reasons = ", ".join(f"{count} {flaw}" for flaw, count in flaws.most_common())
        notice(f"latents in files are made anew where they do not fit: {reasons}")
    _settle_unknown(plan, recache_unknown)
    return plan


def _share_files(plan: LatentsPlan) -> None:
    """Where an image is used several times at one size, its file keeps what the first use needs.

    And mirrored latents if any of them does. Uses whose other settings differ have to do without the file.
    """
    table, used = plan.table, np.flatnonzero(plan.states)
    if len(np.unique(table.subsets[used], axis=0)) < 2:  # none names an image twice
        return
    folder_of = cache(os.path.realpath)

    def place(index: int) -> int:
        folder, name = os.path.split(table[index].path)
        return hash((folder_of(folder), name, *table.buckets[index].tolist()))

    places = np.fromiter(map(place, used.tolist()), np.int64, len(used))
    _, first, number = np.unique(places, return_index=True, return_inverse=True)
    owners = used[first[number]]
    for index, owner in zip(used[owners != used].tolist(), owners[owners != used].tolist(), strict=True):
        recipe, kept = plan.recipe(index), plan.recipe(owner)
        plan.elsewhere[index] = recipe.facts() != kept.facts()
        if not plan.elsewhere[index]:
            plan.mirrored[owner] |= recipe.options.flip_aug or kept.options.flip_aug
    plan.mirrored[used] = plan.mirrored[owners] & ~plan.elsewhere[used]
    if plan.elsewhere.any():
        left = np.flatnonzero(plan.elsewhere)
        notice(
            f"the latents of {len(left)} uses of images are kept in no file and made by each run, because the files "
            f"keep those of an earlier use with other settings; the first image is {table[left[0]].path}"
        )


def _note_times(plan: LatentsPlan, indices: np.ndarray, found: Sequence[Finding]) -> None:
    """Where an image was read to tell that it is the recorded one, spares that the next time, if its file lets us."""
    for index, finding in zip(indices.tolist(), found, strict=True):
        if finding.source is not None:
            with suppress(OSError):
                latents_file.note_time(plan.recipe(index), finding.source)


def _settle_unknown(plan: LatentsPlan, recache: bool) -> None:
    unknown = np.flatnonzero(plan.states == State.UNKNOWN)
    if recache:
        there = [index for index in unknown.tolist() if os.path.exists(plan.table[index].path)]
        plan.states[there] = State.MISSING
    elif len(unknown):
        count = "1 image was" if len(unknown) == 1 else f"{len(unknown)} images were"
        notice(
            f"the latents of {count} made elsewhere and do not tell with which VAE: they are used as they are, "
            f"--recache_unknown makes them anew; the first image is {plan.table[unknown[0]].path}"
        )
