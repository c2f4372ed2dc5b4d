"""Cached latents: the same as encoding on the spot, whatever the group size, and never silently wrong."""

import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from library.data import images
from library.data.caching.cache import make_latents
from library.data.caching.latents_plan import plan_latents
from library.data.dataset import ImageDataset, make_loader
from library.data.plan import PlanSampler, RunPlan
from library.data.records import geometry_of, scan
from library.data.scratch import ScratchFolder
from library.errors import UserError
from tests.latents import LAYOUT, cache_latents, encode
from tests.pictures import dataset, picture, subset


@pytest.fixture
def datasets(tmp_path):
    """Several buckets, mirroring in one of two subsets."""
    for number, size in enumerate([(64, 64), (90, 60), (64, 64), (60, 90), (64, 64)]):
        picture(tmp_path / "a" / f"{number}.png", size, str(number))
        picture(tmp_path / "b" / f"{number}.png", size, str(number))
    return (dataset(subset(tmp_path / "a", flip_aug=True), subset(tmp_path / "b", num_repeats=2)),)


def test_latents_do_not_depend_on_the_group_size(datasets):
    table = scan(datasets)
    caches = [cache_latents(table, datasets, encode, batch_size=size) for size in (1, 3, 100)]
    for record in table:
        for flipped in (False, True):
            first, *others = [cache.latents(record, flipped) for cache in caches]
            assert (first is None) == (flipped and record.subset == 1)
            if first is not None:
                assert (
                    first.shape == (4, record.bucket[1] // 8, record.bucket[0] // 8) == caches[0].shape(record.bucket)
                )
                assert all(torch.equal(first, other) for other in others)


def test_groups_are_of_one_bucket_and_at_most_the_batch_size(datasets):
    shapes = []

    def recording(images, seeds):
        shapes.append(tuple(images.shape))
        assert len(set(seeds)) == len(images)
        return encode(images, seeds)

    cache_latents(scan(datasets), datasets, recording, batch_size=4)
    assert max(shape[0] for shape in shapes) == 4
    assert sum(shape[0] for shape in shapes) == 10 + 5


def test_batches_carry_the_latents_of_their_images(datasets):
    table = scan(datasets)
    cache = cache_latents(table, datasets, encode, batch_size=2)
    plan = RunPlan(table, datasets, seed=3)
    sampler = PlanSampler(plan, 0, 2 * plan.steps_per_epoch)
    with_pixels = list(make_loader(ImageDataset(table, datasets), sampler, 0))
    with_latents = list(make_loader(ImageDataset(table, datasets, cache), sampler, 2))
    mirrored = 0
    for pixels, latents in zip(with_pixels, with_latents, strict=True):
        assert latents.images is None
        assert (pixels.captions, pixels.records, pixels.seeds) == (latents.captions, latents.records, latents.seeds)
        assert torch.equal(pixels.sizes, latents.sizes)
        for index, image, values in zip(pixels.records, pixels.images, latents.latents, strict=True):
            record = table[index]
            straight = cache.latents(record, False)
            flipped = not torch.equal(values, straight)
            mirrored += flipped
            if flipped:
                assert torch.equal(values, cache.latents(record, True))
            noise = values[:3] - avg_pool2d(image[None], 8)[0]
            assert noise.abs().max() < 6, "latents of another image"
            assert abs(noise.mean()) < 0.5
    assert mirrored > 0


def test_a_pickled_cache_is_its_path_and_goes_with_its_maker(datasets):
    table = scan(datasets)
    cache = cache_latents(table, datasets, encode)
    data = pickle.dumps(cache)
    assert len(data) < 500
    assert torch.equal(pickle.loads(data).latents(table[0], False), cache.latents(table[0], False))
    folder = cache.folder
    assert folder.exists()
    del cache
    assert not folder.exists()


def test_latents_are_copies(datasets):
    table = scan(datasets)
    cache = cache_latents(table, datasets, encode)
    before = cache.latents(table[0], False).clone()
    cache.latents(table[0], False).zero_()
    assert torch.equal(cache.latents(table[0], False), before)


def test_latents_that_are_not_finite_are_refused(datasets):
    def overflow(images, seeds):
        return encode(images, seeds) * float("inf")

    with pytest.raises(UserError, match=r"\d\.png: .* not finite: use --no_half_vae"):
        cache_latents(scan(datasets), datasets, overflow, batch_size=2)


def damage(path):
    path.write_bytes(path.read_bytes()[:3000])


def test_an_image_that_does_not_decode_never_trains(tmp_path, datasets, said):
    damage(tmp_path / "a" / "0.png")
    table = scan(datasets)
    cache = cache_latents(table, datasets, encode, batch_size=2)
    assert len(said) == 1
    assert str(tmp_path / "a" / "0.png") in said[0]
    plan = RunPlan(table, datasets, seed=3)
    loader = make_loader(ImageDataset(table, datasets, cache), PlanSampler(plan, 0, plan.steps_per_epoch), 0)
    weights = {item.record: w.item() for b in loader for item, w in zip(b.plan.items, b.weights, strict=True)}
    assert [weights[index] for index in range(len(table))] == [0] + [1] * 9


def test_a_bucket_of_which_nothing_decodes_gives_blanks(tmp_path, datasets, said):
    damage(tmp_path / "a" / "1.png")
    damage(tmp_path / "b" / "1.png")
    table = scan(datasets)
    cache = cache_latents(table, datasets, encode)
    plan = RunPlan(table, datasets, seed=3)
    loader = make_loader(ImageDataset(table, datasets, cache), PlanSampler(plan, 0, plan.steps_per_epoch), 0)
    blanks = [batch for batch in loader if batch.plan.bucket == table[1].bucket]
    assert {batch.latents.shape[1:] for batch in blanks} == {cache.shape(table[1].bucket)}
    assert all(not batch.weights.any() for batch in blanks)


def test_nothing_left_is_an_error(tmp_path, datasets, said):
    for path in tmp_path.glob("*/*.png"):
        damage(path)
    with pytest.raises(UserError, match="no image to train on is left"):
        cache_latents(scan(datasets), datasets, encode)


def test_regularisation_images_alone_are_not_enough(tmp_path, datasets, said):
    subsets = [replace(subset, is_reg=subset.name == "b") for subset in datasets[0].subsets]
    datasets = (replace(datasets[0], subsets=tuple(subsets)),)
    for path in tmp_path.glob("a/*.png"):
        damage(path)
    with pytest.raises(UserError, match="no image to train on is left"):
        cache_latents(scan(datasets), datasets, encode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_reported_with_a_remedy(datasets, monkeypatch):
    class FullFolder(ScratchFolder):
        def __init__(self, purpose: str):
            super().__init__(purpose)
            (self.path / "latents.bin").symlink_to("/dev/full")

    table = scan(datasets)
    monkeypatch.setattr("library.data.caching.cache.ScratchFolder", FullFolder)
    with pytest.raises(UserError, match=r"full after the latents of 0 of 10 images: .* TMPDIR"):
        cache_latents(table, datasets, encode)


def test_images_are_decoded_while_others_are_encoded(datasets, monkeypatch):
    """The encoder waits for the images of later groups, which another thread must be decoding."""
    later = threading.Event()
    decoded = []
    original = images.example

    def example(*arguments):
        decoded.append(arguments[0])
        if len(decoded) > 2:
            later.set()
        return original(*arguments)

    def waiting(pixels, seeds):
        assert later.wait(20)
        return encode(pixels, seeds)

    monkeypatch.setattr(images, "example", example)
    cache_latents(scan(datasets), datasets, waiting, batch_size=2)
    assert len(decoded) == 10


def test_own_alpha_is_kept_as_it_is_without_a_cache(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    Image.fromarray(rng.integers(0, 256, (60, 90, 4), dtype=np.uint8)).save(tmp_path / "a" / "seen.png")
    picture(tmp_path / "a" / "opaque.png", (90, 60))
    datasets = (dataset(subset(tmp_path / "a", alpha_mask=True, flip_aug=True), batch_size=1),)
    table = scan(datasets)
    geometry = geometry_of(table[1], datasets[0].buckets())
    wanted = images.example(table[1].path, geometry, datasets[0].subsets[0].images, None).mask
    memory = cache_latents(table, datasets)
    disk = make_latents(plan_latents(table, datasets, LAYOUT, to_disk=True), encode)
    for cache in (memory, disk):
        assert np.array_equal(cache.alpha_mask(table[1]), wanted)
        assert (cache.alpha_mask(table[0]) == 1).all()
    assert memory.alpha_mask(table[0]).shape == table[0].bucket[::-1]
