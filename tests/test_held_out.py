"""Held-out images in batches: all of them, each time alike."""

from pathlib import Path

import torch

from library.data.captions import compose
from library.data.dataset import ImageDataset
from library.data.held_out import held_out_batches, steady
from library.data.records import scan
from library.randomness import generator
from tests.pictures import dataset, picture, subset


def test_fewer_batches_are_a_part_of_all(tmp_path):
    for number in range(20):
        picture(tmp_path / f"{number}.png", (64, 64) if number % 2 else (96, 32), caption="a")
    datasets = (dataset(subset(tmp_path, validation_split=0.5), batch_size=2),)
    table = scan(datasets)
    batches = held_out_batches(table, datasets)
    assert sorted(item.record for plan in batches for item in plan.items) == table.held_out.tolist()
    assert held_out_batches(table, datasets, 2) == batches[:2]
    assert held_out_batches(table, datasets, 0) == batches
    assert len({plan.bucket for plan in batches}) > 1
    for plan in batches:
        assert {table[item.record].bucket for item in plan.items} == {plan.bucket}


def test_captions_are_those_of_training_in_their_own_order_without_marks():
    whole = subset(
        Path("a"),
        shuffle_caption=True,
        caption_tag_dropout_rate=0.5,
        caption_dropout_rate=1.0,
        keep_tokens_separator="|||",
        token_warmup_step=100,
        enable_wildcard=True,
    )
    ours = steady(dataset(whole)).subsets[0].captions
    text = "cat ||| {red|green|blue}, b , c"
    first, second = (compose(text, ours, rng=generator(5, "caption"), step=1) for _ in range(2))
    assert first == second
    assert first in {f"cat, {colour}, b, c" for colour in ("red", "green", "blue")}
    plain = steady(dataset(subset(Path("a"))))
    assert compose("a,b", plain.subsets[0].captions, rng=generator(5), step=1) == "a,b"


def test_pictures_are_shown_as_they_are(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", caption="a")
    changing = {"flip_aug": True, "color_aug": True, "random_crop": True, "weight": 3.0, "validation_split": 0.5}
    plain = (dataset(subset(tmp_path, validation_split=0.5)),)
    ours = (steady(dataset(subset(tmp_path, **changing))),)
    table = scan(plain)
    for expected, plan in zip(held_out_batches(table, plain), held_out_batches(table, ours), strict=True):
        shown = ImageDataset(table, ours)[plan]
        assert torch.equal(shown.images, ImageDataset(table, plain)[expected].images)
        assert shown.weights.tolist() == [1.0, 1.0]
