"""A run on one of everything: two datasets, masks, regularisation, wildcards, caches, held-out images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.models import loading
from library.training.objective import element_losses, mean_of_samples
from networks.lora import LoRANetwork
from tests import tiny

CONFIG = """
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 16
max_bucket_reso = 64
bucket_reso_steps = 4

[[datasets]]
resolution = 32
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{root}/masked"
  conditioning_data_dir = "{root}/masked/masks"
  num_repeats = 1.5
  weight = 0.5
  caption_prefix = "a {{photo|picture}} of"
  enable_wildcard = true
  shuffle_caption = true
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "{root}/class"
  class_tokens = "shape"
  is_reg = true

[[datasets]]
resolution = [48, 32]
batch_size = 1
network_multiplier = 0.5

  [[datasets.subsets]]
  image_dir = "{root}/wide"
  images_per_epoch = 2
  validation_split = 0.25
  caption_dropout_rate = 0.5
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    tiny.draw_pictures(root / "masked", 4)
    tiny.draw_pictures(root / "class", 3)
    tiny.draw_pictures(root / "wide", 4, size=(48, 32))
    (root / "masked" / "masks").mkdir()
    half = np.zeros((32, 32), dtype=np.uint8)
    half[:16] = 255
    for path in sorted((root / "masked").glob("*.png"))[:3]:
        Image.fromarray(half).save(root / "masked" / "masks" / path.name)
    (root / "data.toml").write_text(CONFIG.format(root=root.as_posix()), encoding="utf-8")
    return root / "data.toml"


@pytest.fixture
def words(flags, config, tmp_path):
    def make(**changes):
        nothing = {"train_data_dir": None, "resolution": None, "caption_extension": None, "train_batch_size": None}
        own = {"dataset_config": config, "masked_loss": True, "network_train_unet_only": True}
        return flags(tmp_path / "out", **(nothing | own | changes))

    return make


def test_it_trains_and_is_described(train, words, tmp_path, capsys):
    train(words(max_train_epochs=2, logging_dir=tmp_path / "logs"))
    shown = capsys.readouterr().out
    assert re.search(r"per epoch: 14 images in 8 batches", shown)  # 6 and as many of the class, 2 of 4
    log = tiny.read_log(tmp_path / "logs")
    assert [len(tiny.scalars(log, "loss/current"))] == [16]
    (text,) = [log.Tensors(tag)[0].tensor_proto.string_val[0] for tag in log.Tags()["tensors"] if "dataset" in tag]
    assert b"| masked |" in text
    assert len(log.Images("dataset")) == 1


def test_latents_beside_the_images_train_like_those_in_a_temporary_file(train, words, tmp_path):
    files = []
    changes = [{"cache_latents_to_disk": True}, {"cache_latents_to_disk": True, "skip_cache_check": True}]
    for number, change in enumerate([{"cache_latents": True}, *changes]):
        train(words(max_train_steps=4, output_name=f"run{number}", **change))
        files.append(tiny.stored(tmp_path / "out" / f"run{number}.safetensors"))
    assert files[0] == files[1] == files[2]


def test_cached_text_trains_like_fresh_text(train, flags, tmp_path):
    for name, change in (("fresh", {}), ("kept", {"cache_text_encoder_outputs": True})):
        train(flags(tmp_path, output_name=name, network_train_unet_only=True, **change))
    files = (tmp_path / f"{name}.safetensors" for name in ("fresh", "kept"))
    assert tiny.largest_difference(*files) < 1e-5


def test_the_dataset_sheet_needs_no_weights(train, words, tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(loading, "load", load)
    train(words(debug_dataset=True))
    page = tmp_path / "out" / "run_dataset" / "index.html"
    assert str(page) in capsys.readouterr().out
    assert "masked" in page.read_text(encoding="utf-8")
    facts = json.loads((page.parent / "dataset.json").read_text(encoding="utf-8"))
    assert facts["shown"] == facts["images"] == 10
    assert not (tmp_path / "out" / "run.safetensors").exists()


def test_what_is_masked_out_counts_as_no_error():
    prediction, target = torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1, 2)
    errors = element_losses(prediction, target)
    assert mean_of_samples(errors).tolist() == [5]
    assert mean_of_samples(errors, torch.tensor([[[[1.0, 0.0]]]])).tolist() == [0.5]
    assert mean_of_samples(errors, torch.tensor([[[[0.5, 0.5]]]])).tolist() == [2.5]
    assert mean_of_samples(errors, torch.zeros(1, 1, 1, 2)).tolist() == [0]


def test_the_network_multiplier_holds_for_training_and_not_for_previews(train, flags, pictures, tmp_path, monkeypatch):
    set_to = []
    original = LoRANetwork.set_multiplier
    monkeypatch.setattr(LoRANetwork, "set_multiplier", lambda self, x: (set_to.append(x), original(self, x)))
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 32\nbatch_size = 2\nnetwork_multiplier = 0.5\n"
        f"[[datasets.subsets]]\nimage_dir = '{next(pictures.iterdir())}'\ncaption_extension = '.txt'\n"
    )
    (tmp_path / "prompts.txt").write_text("a circle --w 32 --h 32 --s 1")
    nothing = {"train_data_dir": None, "resolution": None, "caption_extension": None, "train_batch_size": None}
    previews = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2}
    train(flags(tmp_path, **nothing, **previews, dataset_config=config, max_train_steps=4))
    assert set_to[-4:] == [0.5, 1.0, 0.5, 1.0]
