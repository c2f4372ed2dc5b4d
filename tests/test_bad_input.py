"""Mistakes in what a training run is given: one sentence that says what to do, exit status 2, nothing left behind."""

import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.models.sd import StableDiffusion1
from tests.processes import train_script
from tests.tiny import draw_pictures


@pytest.fixture
def mistake(train, flags, tmp_path, capsys):
    """`mistake(**changes)` starts a run that must be refused, and returns the sentence that it is refused with."""

    def start(*words: str, **changes: object) -> str:
        with pytest.raises(SystemExit) as end:
            train([*flags(**{"output_dir": tmp_path / "out"} | changes), *words])
        assert end.value.code == 2
        (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()]
        return sentence.removeprefix("error: ")

    return start


# The model


def test_a_missing_model_names_a_similar_file(mistake, tmp_path):
    (tmp_path / "dreamlike.safetensors").touch()
    sentence = mistake(pretrained_model_name_or_path=tmp_path / "dreamlike.safetensor")
    assert sentence.startswith("--pretrained_model_name_or_path: ")
    assert f"did you mean {tmp_path / 'dreamlike.safetensors'}?" in sentence


def test_no_model_at_all(mistake):
    assert "give --pretrained_model_name_or_path" in mistake(pretrained_model_name_or_path=None)


def test_a_text_file_as_model(mistake, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("The model is on another disk.\n" * 9)
    assert f"{file} is a text file, not a model" in mistake(pretrained_model_name_or_path=file)


@pytest.mark.parametrize("share", [0.001, 0.7])
def test_a_truncated_model(mistake, tmp_path, model_file, share):
    """Cut in the header, and in the weights."""
    file = tmp_path / "model.safetensors"
    data = model_file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    sentence = mistake(pretrained_model_name_or_path=file)
    assert str(file) in sentence
    assert re.search("bytes are missing, copy it again|only the beginning of one", sentence)


def test_a_lora_as_model(mistake, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, file)
    sentence = mistake(pretrained_model_name_or_path=file)
    assert f"{file} is a LoRA, not a model: give the model that the LoRA belongs to" in sentence


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_with_code_is_refused_and_not_run(mistake, tmp_path, zipped):
    file, mark = tmp_path / "model.ckpt", tmp_path / "the code ran"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "callbacks": Trap(mark)}, file, _use_new_zipfile_serialization=zipped
    )
    sentence = mistake(pretrained_model_name_or_path=file)
    assert f"{file} holds more than tensors" in sentence
    assert ".safetensors" in sentence
    assert not mark.exists()
    with file.open("rb") as stream:  # the trap is one
        torch.load(stream, weights_only=False)
    assert mark.exists()


def test_a_pickle_of_something_else(mistake, tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"a": [1, 2, 3]}))
    assert str(file) in mistake(pretrained_model_name_or_path=file)


# The images


def test_an_empty_image_folder(mistake, tmp_path):
    (tmp_path / "data" / "1_circle").mkdir(parents=True)
    sentence = mistake(train_data_dir=tmp_path / "data")
    assert f"no image to train on is left in {tmp_path / 'data' / '1_circle'}" in sentence


def test_a_folder_without_anything(mistake, tmp_path):
    (tmp_path / "data").mkdir()
    assert f"{tmp_path / 'data' / '10_'}" in mistake(train_data_dir=tmp_path / "data")


def test_a_leaf_folder_as_training_folder_names_the_right_one(mistake, pictures):
    assert mistake(train_data_dir=pictures / "1_sks shape").endswith(f"use --train_data_dir={pictures}")


def test_loose_images_name_the_folder_to_move_them_to(mistake, tmp_path):
    draw_pictures(tmp_path / "circles", 2)
    sentence = mistake(train_data_dir=tmp_path / "circles")
    assert f"move the images into {tmp_path / 'circles' / '10_circles'}" in sentence


def test_captions_under_another_extension_name_the_flag(mistake):
    sentence = mistake(caption_extension=None)
    assert "6 of the 6 images have a .txt file" in sentence
    assert sentence.endswith("use --caption_extension .txt")


def test_a_resolution_that_does_not_fit_the_model_names_the_nearest(mistake):
    assert "needs multiples of 4, the nearest is 32" in mistake(resolution=33)
    sentence = mistake("--enable_bucket", min_bucket_reso=20, max_bucket_reso=40, bucket_reso_steps=10)
    assert sentence.startswith("--bucket_reso_steps: 10 does not fit this model")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two folders: one of three images, and one that does not follow the convention."""
    draw_pictures(tmp_path / "data" / "2_circle", 3)
    draw_pictures(tmp_path / "data" / "circle", 1)
    return tmp_path / "data"


def break_image(path: Path, how: str) -> None:
    if how == "header":
        path.write_bytes(b"no image")
    else:  # decodes up to its middle
        noise = Image.effect_noise((32, 32), 90).convert("RGB")
        noise.save(path)
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("cached", [None, True])
@pytest.mark.parametrize("how", ["header", "middle"])
def test_a_broken_image_and_a_folder_without_repeats_are_skipped(train, flags, tmp_path, data, capsys, how, cached):
    broken = data / "2_circle" / "32_1.png"
    break_image(broken, how)
    train(flags(tmp_path / "out", train_data_dir=data, cache_latents=cached))
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert broken.name in warnings[0]
    assert f"{data / 'circle'} is left out" in shown.err
    counts = ("2", "2", "4", "1") if how == "header" else ("3", "2", "6")  # images, repeats, per epoch, broken
    assert re.search(" +".join(("2_circle", "train", *counts)), shown.out)
    assert ("images that could not be decoded and were not trained on: 1" in shown.out) == (how == "middle")
    assert (tmp_path / "out" / "run.safetensors").exists()


@pytest.mark.parametrize("cached", [None, True])
@pytest.mark.parametrize("how", ["header", "middle"])
def test_nothing_but_broken_images(mistake, data, how, cached):
    for path in (data / "2_circle").glob("*.png"):
        break_image(path, how)
    assert "no image to train on is left" in mistake(train_data_dir=data, cache_latents=cached, train_batch_size=1)


# Where the result goes


def test_an_output_folder_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--output_dir: {folder} cannot be written to" in mistake(output_dir=folder)
    assert (tmp_path / "file").read_text() == "mine"
    assert "give --output_dir a folder" in mistake(output_dir=None)


# The rest of the command line


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rat": "1e-4"}, "--learning_rat: unknown option, did you mean --learning_rate?"),
        (
            {"network_module": "networks.lor"},
            "--network_module: there is no module networks.lor, ours are networks.lora",
        ),
        ({"network_module": "./networks/lore.py"}, "--network_module: networks/lore.py is no file"),
        ({"network_module": "library.cli"}, "--network_module library.cli is no network module"),
        ({"network_module": None}, "give --network_module one, such as networks.lora"),
        ({"network_args": ("conv_dim",)}, "--network_args: 'conv_dim' is not written as name=value"),
        ({"network_args": ("unit=2",)}, "--network_args: networks.lora refuses them: unknown network argument unit"),
        ({"optimizer_args": ("weight_decoy=1",)}, "AdamW takes no weight_decoy, did you mean weight_decay?"),
        ({"optimizer_args": ("betas=2.,2.",)}, "--optimizer_args: AdamW refuses them: Invalid beta parameter"),
        ({"unet_lr": 0, "text_encoder_lr": 0}, "every learning rate of the network is 0"),
        ({"text_encoder_lr": (0.1, 0.2)}, "--text_encoder_lr: 2 rates are given, but the model has one text encoder"),
        ({"sample_every_n_steps": 2}, "give --sample_prompts a file of them"),
        ({"sample_prompts": "nowhere.txt", "sample_at_first": True}, "nowhere.txt: there is no such prompt file"),
    ],
)
def test_a_wrong_value_is_named(mistake, changes, sentence):
    assert sentence in mistake(**changes)


def test_a_mistake_in_a_process_of_its_own(flags, tmp_path, model_file):
    """Nothing but the sentence on the console: before torch is imported, and after."""
    near = tmp_path / "tiny.safetensors"
    shutil.copy(model_file, near)
    missing = train_script(flags(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "tny.safetensors"))
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (2, "", 1)
    assert missing.stderr.startswith("error: ")
    near.write_bytes(near.read_bytes()[:5000])
    cut = train_script(flags(tmp_path / "out", pretrained_model_name_or_path=near))
    assert (cut.returncode, cut.stdout, cut.stderr.count("\n")) == (2, "", 1)
    assert cut.stderr.startswith(f"error: {near}")
    assert not list((tmp_path / "out").iterdir())


def test_an_image_whose_latents_are_not_finite_ends_the_run_by_its_name(train, flags, tmp_path, capsys, monkeypatch):
    original = StableDiffusion1.encode_images
    calls = []

    def encode(self, images, seeds):
        calls.append(len(images))
        latents = original(self, images, seeds)
        if len(calls) == 2:
            latents[1] = float("inf")
        return latents

    monkeypatch.setattr(StableDiffusion1, "encode_images", encode)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", max_train_steps=6, save_every_n_steps=2))
    message = capsys.readouterr().err
    assert re.search(r"32_\d\.png: the VAE's latents for this image are not finite: use --no_half_vae", message)
    assert len(calls) == 3, "told in the step after"
    (saved,) = (tmp_path / "out").glob("*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(saved).values())
