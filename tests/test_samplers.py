import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.generation.prompts import MAX_STEPS
from library.generation.samplers import SAMPLERS, find_sampler, make_scheduler
from library.models.noise import DDPM

ROOT = Path(__file__).parents[1]
NAMES = ["ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"]
NAMES += ["k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
HAS_SCIPY = importlib.util.find_spec("scipy") is not None

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
HERE = [name for name in NAMES if HAS_SCIPY or not SAMPLERS[name].needs_scipy]


def test_every_name_of_the_flag_is_there():
    assert list(SAMPLERS) == NAMES


@pytest.mark.parametrize("name", HERE)
def test_schedulers_follow_the_training_schedule(name):
    process = DDPM()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        scheduler = make_scheduler(name, process)
    assert torch.equal(scheduler.alphas_cumprod, process.alphas_cumprod)
    config = scheduler.config
    assert config.prediction_type == "epsilon"
    assert not config.get("clip_sample")
    assert not config.get("set_alpha_to_one")
    assert config.get("steps_offset", 1) == 1
    assert config.get("timestep_spacing", "leading") == "leading"


@pytest.mark.parametrize("name", HERE)
def test_schedulers_walk_from_noise_to_the_picture(name):
    """With a denoiser that knows the picture, every sampler arrives at it: no clipping, no noise left over."""
    process = DDPM()
    generator = torch.Generator().manual_seed(0)
    picture = 3 * torch.randn((1, 4, 8, 8), generator=generator)
    scheduler = make_scheduler(name, process)
    scheduler.set_timesteps(20)
    latents = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)
        alpha_bar = _alpha_bar(process, float(timestep))
        noise = (noisy - alpha_bar**0.5 * picture) / (1 - alpha_bar) ** 0.5
        latents = scheduler.step(noise, timestep, latents).prev_sample
    assert (latents - picture).abs().mean() < 0.1


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("steps", [1, 2, 3, MAX_STEPS])
def test_every_number_of_steps_stays_within_the_training_schedule(name, steps):
    scheduler = make_scheduler(name, DDPM())
    scheduler.set_timesteps(steps)
    assert min(scheduler.timesteps) >= 0
    assert 500 <= max(scheduler.timesteps) <= 999 or steps == 1


def _alpha_bar(process: DDPM, timestep: float) -> float:
    """Between two training steps, as the samplers of second order take them: linear in log sigma."""
    sigmas = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt().log()
    low = min(int(timestep), len(sigmas) - 2)
    sigma = torch.lerp(sigmas[low], sigmas[low + 1], timestep - low).exp()
    return float(1 / (sigma**2 + 1))


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no sampler 'dpmsolverpp', did you mean dpmsolver(\+\+)?\?"):
        find_sampler("dpmsolverpp")
    with pytest.raises(UserError, match="there is no sampler 'x'; there are ddim, pndm, lms"):
        find_sampler("x")


@pytest.mark.parametrize("name", ["lms", "k_lms"])
def test_missing_scipy_is_said_before_painting(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install scipy"):
        find_sampler(name)
    assert find_sampler("euler") is SAMPLERS["k_euler"]


def test_names_need_no_torch():
    code = "import sys, library.generation.samplers; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
