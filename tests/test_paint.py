import dataclasses
import random

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.generation import paint as paint_module
from library.generation.paint import evaluating, paint
from library.generation.prompts import PromptLine
from library.generation.samplers import SAMPLERS, make_scheduler
from library.models.noise import Prediction
from library.models.sd import StableDiffusion1
from tests import tiny
from tests.pipelines import picture_of, pipeline_of, pixels
from tests.tiny import CLIP, UNET

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

VAE = {
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
REQUEST = PromptLine("a red circle", "blurry", width=32, height=48, seed=7, scale=4.0, sample_steps=4)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusion1.from_configs(UNET, VAE, CLIP).eval()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("k_") and name != "lms"])
def test_pictures_equal_those_of_diffusers(model, sampler):
    ours = pixels(paint(model, REQUEST, default_sampler=sampler))
    theirs = picture_of(pipeline_of(model, make_scheduler(sampler, model.noise_process())), REQUEST)
    assert ours.shape == (48, 32, 3)
    assert ours.std() > 1  # a flat picture would prove nothing
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    ("family", "prediction"),
    [
        ("sd2", Prediction()),
        ("sd2", Prediction("v_prediction")),
        ("sd2", Prediction("v_prediction", zero_terminal_snr=True)),
        ("sdxl", Prediction()),
        ("sdxl", Prediction("v_prediction")),
    ],
)
def test_pictures_of_every_family_equal_those_of_diffusers(family, prediction):
    """Captions read by their encoders, sizes where they are told, and what the denoiser predicts."""
    model = tiny.make_model(family, vae_config=VAE)
    model.prediction = prediction
    for request in (REQUEST, dataclasses.replace(REQUEST, negative_prompt=None, scale=1.0)):
        ours = pixels(paint(model, request))
        theirs = picture_of(pipeline_of(model, make_scheduler("ddim", model.noise_process())), request)
        assert ours.std() > 1
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance(model, scale):
    request = dataclasses.replace(REQUEST, scale=scale)
    difference = pixels(paint(model, request)) - picture_of(
        pipeline_of(model, make_scheduler("ddim", model.noise_process())), request
    )
    assert np.abs(difference).max() <= 1


def test_the_request_decides_the_picture(model):
    picture = pixels(paint(model, REQUEST))
    assert np.array_equal(picture, pixels(paint(model, REQUEST)))
    for change in ({"seed": 8}, {"prompt": "a cube"}, {"negative_prompt": None}, {"scale": 2.0}, {"sampler": "heun"}):
        other = pixels(paint(model, dataclasses.replace(REQUEST, **change)))
        assert not np.array_equal(picture, other), change


def test_what_is_left_open(model, monkeypatch):
    monkeypatch.setattr(paint_module, "DEFAULT_STEPS", 4)
    monkeypatch.setattr(model, "latents", dataclasses.replace(model.latents, default_size=24))
    short = PromptLine("a red circle", seed=7, sampler="euler_a")
    full = PromptLine("a red circle", "", 24, 24, 7, 7.5, 4, "euler_a")
    ours = paint(model, short, default_sampler="no such sampler")
    assert np.array_equal(pixels(ours), pixels(paint(model, full)))


def test_sizes_the_model_cannot_do_are_rounded_down(model, monkeypatch):
    messages = []
    monkeypatch.setattr(paint_module, "notice", messages.append)
    assert model.latents.step == 8
    assert paint(model, dataclasses.replace(REQUEST, width=31, height=5)).size == (24, 8)
    assert messages == ["this model paints sizes that are multiples of 8: 24x8 instead of 31x5"]


def test_a_control_image_without_a_controlnet_changes_nothing(model, monkeypatch):
    messages = []
    monkeypatch.setattr(paint_module, "notice", messages.append)
    picture = paint(model, dataclasses.replace(REQUEST, control_image="c.png"))
    assert np.array_equal(pixels(picture), pixels(paint(model, REQUEST)))
    assert len(messages) == 1
    assert "c.png" in messages[0]


def test_painting_touches_nothing(model):
    model.train()
    model.vae.eval()
    model.unet.down_blocks[0].eval()
    try:
        before = _state(model)
        paint(model, dataclasses.replace(REQUEST, sampler="euler_a"))
        assert _state(model) == before
        with pytest.raises(UserError, match="no sampler"):
            paint(model, dataclasses.replace(REQUEST, sampler="nothing"))
        assert _state(model) == before
    finally:
        model.eval()


def test_global_generators_do_not_change_the_picture(model):
    for sampler in ("ddim", "euler", "euler_a", "heun", "dpm_2_a", "dpmsolver++", "dpmsingle"):
        request = dataclasses.replace(REQUEST, sampler=sampler)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = pixels(paint(model, request))
            torch.manual_seed(2)
            assert np.array_equal(first, pixels(paint(model, request)))


def _state(model):
    """Everything painting could leave changed: weights, gradients, modes, and the global generators."""
    return (
        {name: (value.sum().item(), value.requires_grad, value.grad) for name, value in model.named_parameters()},
        [(name, module.training) for name, module in model.named_modules()],
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        [list(part) if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    )


def test_modules_go_back_to_their_modes_after_an_error():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()
    seen = []

    def fail():
        with evaluating(module):
            seen.extend(part.training for part in module.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False, False, False]
    assert [part.training for part in module.modules()] == [True, True, False]


def test_a_seed_is_needed(model):
    with pytest.raises(ValueError, match="seed"):
        paint(model, PromptLine("a red circle"))


def test_values_that_are_not_finite_are_told(model, monkeypatch):
    messages = []
    monkeypatch.setattr(paint_module, "warn", messages.append)
    monkeypatch.setattr(model, "decode_latents", lambda latents: torch.full((1, 3, 8, 8), torch.nan))
    assert pixels(paint(model, REQUEST)).tolist() == np.full((8, 8, 3), 128).tolist()
    assert len(messages) == 1
    assert "not finite" in messages[0]
