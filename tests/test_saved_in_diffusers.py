"""What real trainings save, where users load it: in Diffusers' pipelines, and as the base of the next training."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.generation.samplers import make_scheduler
from library.models.registry import load_model
from library.models.writing import write_model
from networks.lora import create_network_from_weights
from tests.pipelines import picture_of, pixels
from tests.tiny import make_model
from tests.trained import check_in_diffusers, with_lora
from tests.trajectories import data_for

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

REQUEST = parse_line("sks, a red circle --n blue --w 32 --h 48 --s 4 --l 5 --d 3")
MODEL = {"network_module": None, "learning_rate": 1e-3, "max_train_steps": 3}
SCRIPTS = {"sd1": "train_db", "sd2": "train_db", "sdxl": "sdxl_train"}


@pytest.fixture
def trained(train, flags, model_files, tmp_path):
    """`trained(name, family, script, **changes)`: what a short run saves."""

    def run(name: str, family: str, script: str, **changes: object) -> Path:
        base = {"pretrained_model_name_or_path": model_files(family), "v2": True if family == "sd2" else None}
        train(flags(tmp_path / name, **base | changes), script=script)
        (saved,) = (tmp_path / name).iterdir()
        return saved

    return run


def in_diffusers(saved: Path, family: str, folder: Path) -> DiffusionPipeline:
    """The pipeline that a user loads. What single files do not tell, Diffusers takes from the hub; here, where there is
    none, from a `folder` with a model that is built alike.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        if saved.is_dir():
            pipeline = DiffusionPipeline.from_pretrained(saved, local_files_only=True)
        else:
            kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
            alike = write_model(make_model(family), folder / "alike", "diffusers_safetensors")
            pipeline = kind.from_single_file(str(saved), config=str(alike), local_files_only=True)
    model = load_model(saved)
    pipeline.scheduler = make_scheduler("ddim", model.noise_process())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd2", "ckpt"),
        ("sdxl", "diffusers"),
        pytest.param("sd1", "safetensors", marks=pytest.mark.slow),
        pytest.param("sd1", "diffusers", marks=pytest.mark.slow),
        pytest.param("sd2", "diffusers_safetensors", marks=pytest.mark.slow),
        pytest.param("sdxl", "safetensors", marks=pytest.mark.slow),
        pytest.param("sdxl", "ckpt", marks=pytest.mark.slow),
    ],
)
def test_a_trained_model_paints_in_diffusers_what_it_paints_here(trained, model_files, tmp_path, family, kind):
    saved = trained(
        "a", family, SCRIPTS[family], **MODEL, save_model_as=kind, train_text_encoder=family == "sdxl" or None
    )
    ours = pixels(paint(load_model(saved), REQUEST))
    assert np.abs(ours - pixels(paint(load_model(model_files(family)), REQUEST))).mean() > 4
    theirs = picture_of(in_diffusers(saved, family, tmp_path), REQUEST)
    assert np.abs(ours - theirs).mean() < 0.2


def test_a_lora_of_version_2_paints_in_diffusers_what_it_paints_here(trained, model_files):
    file = trained("a", "sd2", "train_network", learning_rate=0.05, max_train_steps=6)
    check_in_diffusers(file, lambda: load_model(model_files("sd2")))


def test_training_goes_on_from_what_was_trained(trained, tmp_path):
    """Fine-tuned, trained again as DreamBooth, a LoRA on top; all of it painted with in Diffusers, in both ways."""
    data = data_for("fine_tune", tmp_path / "data") | {"caption_extension": None}
    first = trained("first", "sd1", "fine_tune", **MODEL, **data, save_model_as="diffusers_safetensors")
    still = {"pretrained_model_name_or_path": first, "save_model_as": "safetensors"} | MODEL
    again = trained("still", "sd1", "train_db", **still | {"learning_rate": 1e-30, "max_train_steps": 1})
    as_file = write_model(load_model(first), tmp_path / "first", "safetensors")
    before, after = load_file(as_file), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-29) for name in before)  # 0 becomes 1e-30

    second = trained("second", "sd1", "train_db", **still | {"save_precision": "fp16", "save_model_as": "ckpt"})
    base = {"pretrained_model_name_or_path": second, "learning_rate": 0.05, "max_train_steps": 6}
    lora = trained("lora", "sd1", "train_network", **base)
    plain = pixels(paint(load_model(second), REQUEST))
    ours = pixels(paint(with_lora(load_model(second), lora), REQUEST))
    assert np.abs(ours - plain).mean() > 4, "the LoRA must be seen for its picture to be compared"
    pipeline = in_diffusers(second, "sd1", tmp_path)
    pipeline.load_lora_weights(lora)
    assert np.abs(ours - picture_of(pipeline, REQUEST)).mean() < 0.2
    pipeline = in_diffusers(second, "sd1", tmp_path)
    network, weights = create_network_from_weights(
        1.0, None, pipeline.vae, pipeline.text_encoder, pipeline.unet, load_file(lora)
    )
    network.apply_to(pipeline.text_encoder, pipeline.unet)
    network.load_state_dict(weights)
    assert np.abs(ours - picture_of(pipeline, REQUEST)).mean() < 0.2
