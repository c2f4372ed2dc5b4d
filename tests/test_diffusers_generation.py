"""A LoRA trained here paints in Diffusers' own pipeline what it paints here."""

import dataclasses

import numpy as np
import pytest
from diffusers import DDIMScheduler

from library.generation.paint import paint
from library.generation.prompts import PromptLine
from library.generation.samplers import make_scheduler
from library.models.noise import DDPM, Prediction, scheduler_config
from library.models.registry import load_model
from networks.lora import create_network_from_weights
from tests.pipelines import picture_of, pipeline_of, pixels

REQUEST = PromptLine("sks, a red circle", "blue", width=32, height=48, seed=3, scale=5.0, sample_steps=6)


@pytest.fixture(scope="module")
def model(model_file):
    return load_model(model_file)


@pytest.fixture
def pipeline(model_file):
    """Diffusers' pipeline around the modules of a model of its own."""
    model = load_model(model_file)
    return pipeline_of(model, make_scheduler("ddim", model.noise_process()))


@pytest.mark.parametrize(("precision", "alpha"), [("float", 4), ("fp16", 1)])
def test_a_trained_lora_paints_the_same_in_diffusers(train, flags, tmp_path, model, pipeline, precision, alpha):
    train(flags(tmp_path, save_precision=precision, network_alpha=alpha, learning_rate=0.05, max_train_steps=10))
    file = tmp_path / "run.safetensors"
    plain = pixels(paint(model, REQUEST))
    text_encoder, unet = model.attach_points().text_encoders[0], model.attach_points().unet
    network, weights = create_network_from_weights(1.0, file, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.load_state_dict(weights)
    ours = pixels(paint(model, REQUEST))
    network.set_multiplier(0)

    pipeline.load_lora_weights(file)
    theirs = picture_of(pipeline, REQUEST)
    assert np.abs(ours - plain).mean() > 4, "the LoRA must be seen for its picture to be compared"
    assert np.abs(ours - theirs).mean() < 0.2


def test_without_the_lora_the_pictures_agree_too(model, pipeline):
    request = dataclasses.replace(REQUEST, negative_prompt=None)
    assert np.abs(pixels(paint(model, request)) - picture_of(pipeline, request)).mean() < 0.2


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_models_that_predict_v_agree_with_a_pipeline_of_their_configuration(model, zero_terminal_snr, monkeypatch):
    prediction = Prediction("v_prediction", zero_terminal_snr)
    request = dataclasses.replace(REQUEST, negative_prompt=None)
    of_noise = pixels(paint(model, request))
    monkeypatch.setattr(model, "noise_process", lambda: DDPM(prediction))
    ours = pixels(paint(model, request))
    scheduler = DDIMScheduler(**scheduler_config(prediction), clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    assert np.abs(ours - of_noise).mean() > 4, "the prediction must be seen for its picture to be compared"
    assert np.abs(ours - picture_of(pipeline_of(model, scheduler), request)).mean() < 0.2
