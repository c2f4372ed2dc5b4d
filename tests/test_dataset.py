"""Batches: their tensors, their weights, and that loader processes change nothing about them."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import images
from library.data.buckets import Geometry
from library.data.caching.text_cache import TextLayout, cache_text
from library.data.dataset import ImageDataset, make_loader, size_conditioning
from library.data.plan import PlanSampler, RunPlan
from library.data.records import geometry_of, scan
from library.errors import UserError
from tests.latents import cache_latents
from tests.pictures import dataset, picture, subset


@pytest.fixture
def mixed(tmp_path):
    """Two datasets: one with regularisation images and shuffled captions, one with mirroring."""
    for number, size in enumerate([(64, 64), (90, 60), (64, 64), (60, 90), (33, 31)]):
        picture(tmp_path / "train" / f"{number}.png", size, f"red, green, blue, {number}")
        picture(tmp_path / "reg" / f"{number}.png", size)
    train = subset(tmp_path / "train", num_repeats=2, shuffle_caption=True, keep_tokens=1)
    reg = subset(tmp_path / "reg", is_reg=True, class_tokens="shape")
    mirrored = subset(tmp_path / "train", flip_aug=True)
    return (dataset(train, reg), dataset(mirrored, batch_size=3, resolution=(32, 32), max_bucket_reso=64))


def plan_of(table, datasets, **options):
    return RunPlan(table, datasets, **({"seed": 5} | options))


def batches_of(loader):
    return list(loader)


def same(first, second) -> bool:
    """Whether two batches hold the same facts and the very same numbers."""
    plain = ("plan", "seeds", "records", "captions")
    tensors = ("images", "sizes", "weights")
    return all(getattr(first, name) == getattr(second, name) for name in plain) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in tensors
    )


def test_templates_take_the_place_of_captions_but_for_regularisation_images(mixed):
    table = scan(mixed)
    examples, plan, found = ImageDataset(table, mixed, templates=("a sks",)), plan_of(table, mixed), set()
    for batch in map(examples.__getitem__, plan.iterate(0, plan.steps_per_epoch)):
        for index, caption in zip(batch.records, batch.captions, strict=True):
            record = table[index]
            found.add((mixed[record.dataset].subsets[record.subset].is_reg, caption))
    assert found == {(False, "a sks"), (True, "shape")}


def test_a_batch_holds_what_its_plan_says(mixed):
    table = scan(mixed)
    examples = ImageDataset(table, mixed, prior_loss_weight=0.25)
    plan = plan_of(table, mixed)
    for batch_plan in plan.iterate(0, 2 * plan.steps_per_epoch):
        batch = examples[batch_plan]
        count, (width, height) = len(batch_plan.items), batch_plan.bucket
        assert batch.images.shape == (count, 3, height, width)
        assert batch.images.dtype == batch.sizes.dtype == batch.weights.dtype == torch.float32
        assert batch.images.min() >= -1
        assert batch.images.max() <= 1
        assert batch.latents is None
        assert batch.records == [item.record for item in batch_plan.items]
        assert batch.seeds == [item.seed for item in batch_plan.items]
        for index, caption, weight, size in zip(batch.records, batch.captions, batch.weights, batch.sizes, strict=True):
            record = table[index]
            is_reg = mixed[record.dataset].subsets[record.subset].is_reg
            assert weight == (0.25 if is_reg else 1)
            assert sorted(caption.split(", ")) == sorted(record.caption.split(", "))
            assert caption.split(", ")[0] == record.caption.split(", ")[0]
            assert size[:2].tolist() == [record.height, record.width]
            assert size[4:].tolist() == [height, width]


def test_pixels_are_those_of_the_file(tmp_path):
    path = picture(tmp_path / "a.png", (64, 64), "x")
    datasets = (dataset(subset(tmp_path)),)
    table = scan(datasets)
    (batch_plan,) = plan_of(table, datasets).iterate(0, 1)
    expected = torch.from_numpy(images.load(path, images.ImageOptions())[0].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(ImageDataset(table, datasets)[batch_plan].images[0], expected, atol=1e-6)


def test_mirroring_takes_about_half_of_the_images(tmp_path):
    path = picture(tmp_path / "a.png", (64, 64), "x")
    datasets = (dataset(subset(tmp_path, flip_aug=True, num_repeats=200), batch_size=50),)
    table = scan(datasets)
    straight = torch.from_numpy(images.to_model_range(images.load(path, images.ImageOptions())[0]))
    examples = ImageDataset(table, datasets)
    kinds = []
    for batch_plan in plan_of(table, datasets).iterate(0, 4):
        for image in examples[batch_plan].images:
            mirrored = torch.equal(image, straight.flip(2))
            assert mirrored or torch.equal(image, straight)
            kinds.append(mirrored)
    assert 70 < sum(kinds) < 130


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(mixed, context):
    if context == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    table = scan(mixed)
    examples = ImageDataset(table, mixed)
    plan = plan_of(table, mixed, accumulation=2)
    sampler = PlanSampler(plan, 1, plan.steps_per_epoch + 2)
    alone = batches_of(make_loader(examples, sampler, 0))
    loader = make_loader(examples, sampler, 2)
    loader.multiprocessing_context = context
    together = batches_of(loader)
    assert len(alone) == len(together) > 5
    assert all(map(same, alone, together))
    assert table.folder.exists(), "workers must not delete what they share"


def test_what_is_sent_to_a_worker_is_light(tmp_path):
    for number in range(100):
        picture(tmp_path / f"{number}.png", (8, 8), "a long caption " * 50)
    datasets = (dataset(subset(tmp_path)),)
    table = scan(datasets)
    assert len(pickle.dumps(ImageDataset(table, datasets))) < 3000


class TestFailures:
    def datasets(self, tmp_path, sound, broken):
        """Files that look sound until they are decoded."""
        for number in range(sound):
            picture(tmp_path / f"{number}.png", (64, 64), str(number))
        for number in range(broken):
            path = picture(tmp_path / f"broken{number}.png", (64, 64), "broken")
            path.write_bytes(path.read_bytes()[:5000])
        return (dataset(subset(tmp_path), batch_size=4),)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_another_image_stands_in_and_weighs_nothing(self, tmp_path, said, workers):
        datasets = self.datasets(tmp_path, 3, 1)
        table = scan(datasets)
        loader = make_loader(ImageDataset(table, datasets), PlanSampler(plan_of(table, datasets), 0, 2), workers)
        for batch in loader:
            place = [item.record for item in batch.plan.items].index(3)
            assert batch.weights.tolist() == [0.0 if n == place else 1.0 for n in range(4)]
            assert batch.records[place] in (0, 1, 2)
            assert batch.captions[place] == str(batch.records[place])
            assert torch.equal(batch.images[place], batch.images[batch.records.index(batch.records[place])])
        assert loader.failures == {3}
        assert all(str(tmp_path / "broken0.png") in message for message in said)

    def test_a_batch_with_nothing_left_weighs_nothing(self, tmp_path, said):
        datasets = self.datasets(tmp_path, 0, 2)
        table = scan(datasets)
        batch = ImageDataset(table, datasets)[next(plan_of(table, datasets).iterate(0, 1))]
        assert batch.weights.tolist() == [0, 0]
        assert batch.images.shape == (2, 3, 64, 64)
        assert torch.isfinite(batch.images).all()

    def test_it_ends_when_no_image_is_left(self, tmp_path, said):
        datasets = self.datasets(tmp_path, 0, 6)
        table = scan(datasets)
        batches = make_loader(ImageDataset(table, datasets), plan_of(table, datasets).iterate(0, 2), 0)
        with pytest.raises(UserError, match="no image to train on is left"):
            list(batches)
        assert len(said) == 6

    def test_it_ends_when_only_regularisation_images_are_left(self, tmp_path, said):
        broken = self.datasets(tmp_path / "train", 0, 3)[0].subsets[0]
        sound = self.datasets(tmp_path / "reg", 4, 0)[0].subsets[0]
        datasets = (dataset(broken, replace(sound, is_reg=True), batch_size=1),)
        table = scan(datasets)
        assert table.training(datasets).tolist() == [True] * 3 + [False] * 4
        batches = make_loader(ImageDataset(table, datasets), plan_of(table, datasets).iterate(0, 6), 0)
        with pytest.raises(UserError, match="no image to train on is left"):
            list(batches)
        assert len(said) == 3

    def test_a_folder_that_vanishes_ends_the_run(self, tmp_path, said):
        datasets = self.datasets(tmp_path / "data", 4, 0)
        table = scan(datasets)
        batches = iter(make_loader(ImageDataset(table, datasets), plan_of(table, datasets).iterate(0, 4), 0))
        next(batches)
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=f"the folder {tmp_path / 'data'} is gone"):
            next(batches)

    def test_a_broken_mask_is_named(self, tmp_path, said):
        datasets = self.datasets(tmp_path, 2, 0)
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks" / "0.png").write_bytes(b"")
        masked = replace(datasets[0].subsets[0], conditioning_data_dir=tmp_path / "masks")
        datasets = (replace(datasets[0], subsets=(masked,)),)
        table = scan(datasets)
        list(make_loader(ImageDataset(table, datasets, masked_loss=True), plan_of(table, datasets).iterate(0, 1), 0))
        assert f"its mask {tmp_path / 'masks' / '0.png'}: the file is empty" in said[-1]

    def test_an_image_that_vanishes(self, tmp_path, said):
        datasets = self.datasets(tmp_path, 2, 0)
        table = scan(datasets)
        (tmp_path / "0.png").unlink()
        (batch,) = make_loader(ImageDataset(table, datasets), plan_of(table, datasets).iterate(0, 1), 0)
        assert batch.weights.sum() == 1
        assert "no longer there" in said[0]


def test_fillers_weigh_nothing(tmp_path):
    picture(tmp_path / "a.png", caption="x")
    datasets = (dataset(subset(tmp_path)),)
    table = scan(datasets)
    (filler,) = plan_of(table, datasets, world=2, rank=1).iterate(0, 1)
    assert filler.filler
    batch = ImageDataset(table, datasets)[filler]
    assert batch.weights.tolist() == [0]
    assert batch.images.shape == (1, 3, 64, 64)


def test_size_conditioning_follows_the_golden_crop_values(tmp_path):
    picture(tmp_path / "a.png", (1024, 64), "x")
    datasets = (dataset(subset(tmp_path)),)
    record = scan(datasets)[0]
    geometry = Geometry((576, 448), (597, 448), (0.0, 8.0, 565.7, 440.0), 0.0)
    assert size_conditioning(record, geometry, False) == (64, 1024, 8, 0, 448, 576)
    assert size_conditioning(record, geometry, True) == (64, 1024, 8, 10, 448, 576)


def test_moving_a_batch(tmp_path):
    picture(tmp_path / "a.png", caption="x")
    datasets = (dataset(subset(tmp_path)),)
    table = scan(datasets)
    batch = ImageDataset(table, datasets)[next(plan_of(table, datasets).iterate(0, 1))]
    moved = batch.to("meta")
    assert moved.images.device.type == moved.sizes.device.type == moved.weights.device.type == "meta"
    assert moved.plan == batch.plan
    assert moved.latents is None
    assert np.isfinite(batch.images.numpy()).all()


class TestMasks:
    """A picture whose left half is masked out, by a mask file and by its own alpha."""

    def datasets(self, tmp_path, **options):
        half = np.zeros((64, 64, 4), dtype=np.uint8)
        half[:, 32:] = 255
        half[..., :3] = 200
        (tmp_path / "masks").mkdir()
        Image.fromarray(half).save(tmp_path / "a.png")
        Image.fromarray(half[..., 3]).save(tmp_path / "masks" / "a.png")
        picture(tmp_path / "b.png", (64, 64))
        return (dataset(subset(tmp_path, **options), batch_size=2),)

    def masks(self, datasets, **options):
        """Loss masks (h, w) of the first epoch by file, and whether that use was mirrored."""
        table = scan(datasets)
        examples = ImageDataset(table, datasets, **options)
        for batch_plan in plan_of(table, datasets).iterate(0, 8):
            batch = examples[batch_plan]
            for index, mask in zip(
                batch.records, [None] * 2 if batch.loss_mask is None else batch.loss_mask, strict=True
            ):
                yield os.path.basename(table[index].path), mask

    @pytest.mark.parametrize("kind", ["file", "alpha", "both"])
    def test_the_loss_mask_is_the_mask_at_the_size_of_the_latents(self, tmp_path, kind):
        options = {"conditioning_data_dir": tmp_path / "masks"} if kind != "alpha" else {}
        datasets = self.datasets(tmp_path, alpha_mask=kind != "file", **options)
        left, right = torch.zeros(8, 4), torch.ones(8, 4)
        for name, mask in self.masks(datasets, masked_loss=kind != "alpha"):
            assert mask.shape == (1, 8, 8)
            expected = torch.cat([left, right], 1) if name == "a.png" else torch.ones(8, 8)
            assert torch.allclose(mask[0], expected, atol=0.01)

    def test_the_loss_mask_is_mirrored_with_the_image(self, tmp_path):
        datasets = self.datasets(tmp_path, conditioning_data_dir=tmp_path / "masks", flip_aug=True)
        sides = {float(mask[0, 0, 0]) for name, mask in self.masks(datasets, masked_loss=True) if name == "a.png"}
        assert sides == {0.0, 1.0}

    def test_mask_files_are_not_used_without_masked_loss(self, tmp_path):
        datasets = self.datasets(tmp_path, conditioning_data_dir=tmp_path / "masks")
        assert {mask for _, mask in self.masks(datasets)} == {None}

    @pytest.mark.parametrize("kind", ["file", "alpha"])
    def test_cached_latents_have_the_same_masks(self, tmp_path, kind):
        options = {"conditioning_data_dir": tmp_path / "masks"} if kind == "file" else {"alpha_mask": True}
        datasets = self.datasets(tmp_path, flip_aug=True, **options)
        latents = cache_latents(scan(datasets), datasets)
        cached = self.masks(datasets, masked_loss=True, latents=latents)
        for (name, mask), (other, expected) in zip(cached, self.masks(datasets, masked_loss=True), strict=True):
            assert name == other
            assert torch.equal(mask, expected)


def test_a_batch_says_what_its_subsets_say(tmp_path):
    picture(tmp_path / "a" / "a.png", (64, 64))
    picture(tmp_path / "b" / "b.png", (64, 64))
    first = subset(tmp_path / "a", weight=0.5, custom_attributes={"kind": "a"})
    second = subset(tmp_path / "b", is_reg=True)
    datasets = (dataset(first, second, network_multiplier=-1.0),)
    table = scan(datasets)
    (batch_plan,) = plan_of(table, datasets).iterate(0, 1)
    batch = ImageDataset(table, datasets, prior_loss_weight=0.25)[batch_plan]
    assert batch.network_multiplier == -1
    facts = dict(zip(batch.records, zip(batch.weights.tolist(), batch.custom_attributes, strict=True), strict=True))
    assert facts == {0: (0.5, {"kind": "a"}), 1: (0.25, {})}


def test_cached_text_comes_with_its_caption_and_the_empty_one_where_it_is_dropped(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", (64, 64), name)
    datasets = (dataset(subset(tmp_path, caption_prefix="see", caption_dropout_rate=0.5, num_repeats=20)),)
    table = scan(datasets)

    def say(captions):
        return {
            "hidden_state1": torch.tensor([[[len(caption), ord(caption[-1:] or " ")]] for caption in captions]).float()
        }

    cache = cache_text(table, datasets, say, TextLayout("_x.npz", {"hidden_state1": "hidden_state1"}, "f"))
    captions = set()
    for batch_plan in plan_of(table, datasets).iterate(0, 10):
        batch = ImageDataset(table, datasets, text=cache)[batch_plan]
        plain = ImageDataset(table, datasets)[batch_plan]
        assert batch.captions == plain.captions
        assert torch.equal(batch.text["hidden_state1"], say(batch.captions)["hidden_state1"])
        captions.update(batch.captions)
    assert captions == {"", "see a", "see b"}
    assert batch.to("meta").text["hidden_state1"].is_meta


def test_a_mirrored_example_has_mirrored_crop_values(tmp_path):
    path = picture(tmp_path / "a.png", (63, 118))
    datasets = (dataset(subset(tmp_path, flip_aug=True, num_repeats=8), batch_size=8),)
    table = scan(datasets)
    geometry = geometry_of(table[0], datasets[0].buckets())
    straight = torch.from_numpy(
        images.to_model_range(images.example(path, geometry, images.ImageOptions(), None).image)
    )
    (batch_plan,) = plan_of(table, datasets).iterate(0, 1)
    batch = ImageDataset(table, datasets)[batch_plan]
    expected = {flipped: size_conditioning(table[0], geometry, flipped) for flipped in (False, True)}
    assert expected[False] != expected[True]
    kinds = set()
    for image, size in zip(batch.images, batch.sizes, strict=True):
        flipped = not torch.equal(image, straight)
        kinds.add(flipped)
        assert tuple(size.tolist()) == expected[flipped]
    assert kinds == {False, True}
