"""Making latents for files: in which groups, by which process, and what happens where a disk or an image fails."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.caching import npz
from library.data.caching.cache import make_latents, write_latents
from library.data.caching.latents_plan import plan_latents
from library.data.dataset import ImageDataset, make_loader
from library.data.plan import PlanSampler, RunPlan
from library.data.records import scan
from library.errors import UserError
from tests.latents import LAYOUT, Disk, contents, encode
from tests.pictures import dataset, picture, subset


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures in three buckets."""
    for number, size in enumerate([(64, 64), (90, 60), (64, 64), (60, 90), (64, 64)]):
        picture(tmp_path / "a" / f"{number}.png", size, str(number))
    return tmp_path / "a"


def test_a_whole_group_is_computed_and_only_what_is_missing_written(folder):
    disk = Disk(dataset(subset(folder)))
    disk.cache(batch_size=3)
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    (folder / "2_0064x0064_sd.npz").unlink()
    disk.cache(batch_size=3)
    assert disk.encoded == 3
    assert contents(folder) == before
    changed = [path.name for path in folder.glob("*.npz") if path.stat().st_mtime_ns != times[path.name]]
    assert changed == ["2_0064x0064_sd.npz"]


def test_a_picture_that_does_not_decode_changes_no_other(folder, said):
    """A batch of another size would give other last bits."""
    shapes = []

    def recording(images, seeds):
        shapes.append(len(images))
        return encode(images, seeds)

    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    table = scan([dataset(subset(folder))])
    plan = plan_latents(table, [dataset(subset(folder))], LAYOUT, to_disk=True)
    cache = make_latents(plan, recording, batch_size=3)
    assert sorted(shapes) == [1, 1, 3]
    assert cache.left_out == 1
    assert len(contents(folder)) == 4
    assert len(said) == 1
    assert "2.png" in said[0]


def test_with_no_check_a_file_is_enough(folder):
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    disk.cache(skip_check=True)
    assert disk.encoded == 0
    (folder / "0_0064x0064_sd.npz").unlink()
    disk.cache(skip_check=True, batch_size=1)
    assert disk.encoded == 1


def test_with_no_check_a_file_of_another_size_is_not_enough(folder):
    small, large = (dataset(subset(folder), resolution=(side, side)) for side in (64, 96))
    Disk(small).cache()
    disk = Disk(small, large)
    disk.cache(skip_check=True)
    assert disk.encoded == 5
    disk.cache(skip_check=True)
    assert disk.encoded == 0
    disk = Disk(dataset(subset(folder, flip_aug=True)))
    disk.cache(skip_check=True)
    assert disk.encoded == 10


def test_the_posterior_draw_is_that_of_the_file_wherever_it_is_used(tmp_path):
    """Not that of its number among the datasets, nor of the group, nor of the mirror image."""
    seeds = {}

    def recording(name):
        def record(images, group):
            seeds.setdefault(name, []).extend(group)
            return encode(images, group)

        return record

    for name in ("a", "b"):
        for number in range(3):
            picture(tmp_path / name / f"{number}.png", (64, 64), "x")
    a, b = (subset(tmp_path / name, flip_aug=True) for name in ("a", "b"))
    for name, size, configs in (
        ("alone", 1, [dataset(b)]),
        ("grouped", 3, [dataset(b)]),
        ("second", 2, [dataset(a), dataset(b)]),
    ):
        table = scan(configs)
        make_latents(plan_latents(table, configs, LAYOUT), recording(name), batch_size=size)
    assert len(set(seeds["second"])) == 12
    assert set(seeds["alone"]) == set(seeds["grouped"])
    assert set(seeds["alone"]) < set(seeds["second"])


def test_a_folder_may_be_named_from_within(folder, monkeypatch):
    absolute = Disk(dataset(subset(folder)))
    wanted = absolute.cache(to_disk=False)
    monkeypatch.chdir(folder)
    relative = Disk(dataset(subset(Path("."))))
    cache = relative.cache()
    for one, other in zip(absolute.table, relative.table, strict=True):
        assert torch.equal(wanted.latents(one, False), cache.latents(other, False))


# --- several processes ---


def test_shares_of_processes_make_the_files_that_one_makes(folder):
    configs = [dataset(subset(folder, flip_aug=True))]
    table = scan(configs)
    tally = write_latents(plan_latents(table, configs, LAYOUT, to_disk=True), encode, batch_size=2)
    assert (tally.written, tally.valid, tally.failed) == (5, 0, [])
    alone = contents(folder)
    for path in folder.glob("*.npz"):
        path.unlink()
    plans = [plan_latents(table, configs, LAYOUT, to_disk=True) for _ in range(2)]
    tallies = [write_latents(plan, encode, batch_size=2, rank=rank, world=2) for rank, plan in enumerate(plans)]
    assert all(tally.written for tally in tallies)
    assert sum(tally.written for tally in tallies) == 5
    assert contents(folder) == alone
    again = write_latents(plan_latents(table, configs, LAYOUT, to_disk=True), None, batch_size=2, rank=1, world=2)
    assert (again.written, again.valid) == (0, tallies[1].written)


def test_a_process_waits_for_the_files_of_the_others(folder, said):
    configs = [dataset(subset(folder))]
    table = scan(configs)
    plans = [plan_latents(table, configs, LAYOUT, to_disk=True) for _ in range(2)]

    def others() -> None:
        write_latents(plans[1], encode, rank=1, world=2)
        (folder / "0_0064x0064_sd.npz").unlink(missing_ok=True)

    cache = make_latents(plans[0], encode, rank=0, world=2, wait=others)
    assert cache.left_out == 1
    assert "0.png" in said[0]
    assert all(cache.latents(record, False) is not None for record in table if record.index)


def test_a_stale_file_of_an_image_that_no_process_can_decode_is_not_used(folder, said):
    configs = [dataset(subset(folder))]
    Disk(*configs).cache()
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    table = scan(configs)
    plan = plan_latents(table, configs, LAYOUT, to_disk=True)
    cache = make_latents(plan, encode, rank=0, world=2, wait=lambda: None)
    assert cache.latents(table[0], False) is None
    assert cache.left_out == 1


# --- several uses of one image ---


@pytest.fixture
def transparent(tmp_path) -> Path:
    """Four pictures with an alpha channel."""
    (tmp_path / "t").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)).save(tmp_path / "t" / f"{number}.png")
        (tmp_path / "t" / f"{number}.caption").write_text("x")
    return tmp_path / "t"


OTHER_SETTINGS = [{"alpha_mask": True}, {"legacy_image_decode": True}, {"resize_interpolation": "nearest"}]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("options", OTHER_SETTINGS)
@pytest.mark.parametrize("first", [0, 1])
def test_uses_with_other_settings_leave_the_file_to_the_first(transparent, options, first, world):
    configs = [dataset(subset(transparent, **options), batch_size=2), dataset(subset(transparent), batch_size=1)]
    configs = configs[::-1] if first else configs
    table = scan(configs)
    wanted = make_latents(plan_latents(table, configs, LAYOUT), encode, batch_size=2)
    for run in range(3):
        plans = [plan_latents(table, configs, LAYOUT, to_disk=True) for _ in range(world)]
        if world == 2:
            write_latents(plans[1], encode, batch_size=2, rank=1, world=2)
        before = contents(transparent)
        cache = make_latents(plans[0], encode, batch_size=2, rank=0, world=world)
        assert plans[0].missing == 4
        assert not run or contents(transparent) == before
        assert cache.left_out == 0
        for record in table:
            assert torch.equal(cache.latents(record, False), wanted.latents(record, False))
            if configs[record.dataset].subsets[0].images.alpha_mask:
                assert np.array_equal(cache.alpha_mask(record), wanted.alpha_mask(record))


@pytest.mark.parametrize("first", [0, 1])
def test_uses_that_differ_in_mirroring_share_a_file(folder, first):
    configs = [dataset(subset(folder, flip_aug=True)), dataset(subset(folder), batch_size=1)]
    disk = Disk(*configs[::-1] if first else configs)
    cache = disk.cache(batch_size=1)
    assert disk.encoded == 10
    assert not disk.plan.elsewhere.any()
    assert all(cache.latents(record, flipped) is not None for record in disk.table for flipped in (False, True))
    for path in folder.glob("*.npz"):
        path.unlink()
    plans = [plan_latents(disk.table, disk.datasets, LAYOUT, to_disk=True) for _ in range(2)]
    for rank, plan in enumerate(plans):
        write_latents(plan, encode, rank=rank, world=2)
        assert all("latents_flipped" in np.load(path).files for path in folder.glob("*.npz"))


def test_the_tool_passes_over_uses_that_have_no_file_and_says_so(transparent, monkeypatch):
    said = []
    monkeypatch.setattr("library.data.caching.latents_plan.notice", said.append)
    configs = [dataset(subset(transparent)), dataset(subset(transparent, alpha_mask=True))]
    table = scan(configs)
    for written in (4, 0):
        tally = write_latents(plan_latents(table, configs, LAYOUT, to_disk=True), encode)
        assert (tally.written, tally.valid, tally.failed) == (written, 4 - written, [])
        assert len(said) == 1
        assert "4 uses of images are kept in no file" in said.pop()


# --- what must not happen ---


def test_latents_that_are_not_finite_are_never_kept(folder):
    def overflow(images, seeds):
        return encode(images, seeds) * float("nan")

    configs = [dataset(subset(folder))]
    with pytest.raises(UserError, match=r"\.png: the VAE's latents for this image are not finite: use --no_half_vae"):
        make_latents(plan_latents(scan(configs), configs, LAYOUT, to_disk=True), overflow)
    assert not contents(folder)


@pytest.mark.parametrize("harm", ["truncated", "not finite"])
def test_a_file_spoiled_after_the_check_is_named_and_never_trained_on(folder, harm, said):
    configs = [dataset(subset(folder), batch_size=1)]
    Disk(*configs).cache()
    table = scan(configs)
    cache = make_latents(plan_latents(table, configs, LAYOUT, to_disk=True), None)
    path = folder / "0_0064x0064_sd.npz"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        np.savez(path, latents=np.full((4, 8, 8), np.inf, np.float32))
    plan = RunPlan(table, configs, seed=3)
    loader = make_loader(ImageDataset(table, configs, cache), PlanSampler(plan, 0, plan.steps_per_epoch), 0)
    weights = {item.record: w.item() for b in loader for item, w in zip(b.plan.items, b.weights, strict=True)}
    assert weights == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}
    assert any("0.png" in message for message in said)


def failing(number: int, after: int):
    """np.savez that writes `after` files and then half of one."""
    done = []
    savez = np.savez

    def write(file, **arrays):
        if len(done) == after:
            file.write(b"PK half a file")
            raise OSError(number, os.strerror(number))
        done.append(file)
        savez(file, **arrays)

    return write


def test_a_full_disk_leaves_what_is_finished_and_nothing_half_written(folder, monkeypatch):
    disk = Disk(dataset(subset(folder)))
    with monkeypatch.context() as patch:
        patch.setattr(npz.np, "savez", failing(errno.ENOSPC, 2))
        with pytest.raises(UserError, match=r"\d_\d+x\d+_sd\.npz cannot be written because the disk is full"):
            disk.cache()
    assert len([path for path in folder.iterdir() if path.suffix != ".png" and path.suffix != ".caption"]) == 2
    disk.cache(batch_size=1)
    assert disk.encoded == 3


def test_a_read_only_folder_is_said_and_its_latents_are_kept_for_the_run(folder, monkeypatch, said):
    monkeypatch.setattr(npz.np, "savez", failing(errno.EROFS, 2))
    disk = Disk(dataset(subset(folder)))
    cache = disk.cache()
    assert str(folder) in said[0]
    for record in disk.table:
        assert cache.latents(record, False) is not None
    assert len(contents(folder)) == 2
    table = scan(disk.datasets)
    plan = plan_latents(table, disk.datasets, LAYOUT, to_disk=True)
    with pytest.raises(UserError, match="latents in memory, with --cache_latents alone"):
        make_latents(plan, encode, rank=0, world=2)


def test_a_killed_run_goes_on_to_the_very_same_files(folder):
    disk = Disk(dataset(subset(folder, flip_aug=True)), dataset(subset(folder), resolution=(96, 96)))
    disk.cache()
    whole = contents(folder)
    for groups in range(6):
        for path in folder.glob("*.npz"):
            path.unlink()
        calls = []

        def dying(images, seeds, calls=calls, groups=groups):
            if len(calls) == groups:
                raise KeyboardInterrupt
            calls.append(seeds)
            return encode(images, seeds)

        table = scan(disk.datasets)
        with pytest.raises(KeyboardInterrupt):
            make_latents(plan_latents(table, disk.datasets, LAYOUT, to_disk=True), dying, batch_size=2)
        disk.cache()
        assert contents(folder) == whole
