import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from library.errors import UserError
from library.generation.prompts import MAX_STEPS
from library.generation.samplers import SAMPLERS, find_sampler, make_scheduler, set_timesteps
from library.models.noise import DDPM, Prediction, scheduler_config

ROOT = Path(__file__).parents[1]
NAMES = ["ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"]
NAMES += ["k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
HAS_SCIPY = importlib.util.find_spec("scipy") is not None

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
EPSILON, V_PREDICTION = Prediction(), Prediction("v_prediction")
ZERO_TERMINAL = Prediction("v_prediction", zero_terminal_snr=True)
PREDICTIONS = [EPSILON, V_PREDICTION, ZERO_TERMINAL, Prediction("epsilon", zero_terminal_snr=True)]
HERE = [name for name in NAMES if HAS_SCIPY or not SAMPLERS[name].needs_scipy]
DISTINCT = [name for name in HERE if not name.startswith("k_")]


def test_every_name_of_the_flag_is_there():
    assert list(SAMPLERS) == NAMES


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_schedulers_follow_the_training_schedule(name, prediction):
    process = DDPM(prediction)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        scheduler = make_scheduler(name, process)
    assert torch.equal(scheduler.alphas_cumprod[:-1], process.alphas_cumprod[:-1])
    # where no signal is left, most samplers need a little of it: 2**-24, as in Diffusers
    assert abs(scheduler.alphas_cumprod[-1] - process.alphas_cumprod[-1]) <= prediction.zero_terminal_snr * 2**-24
    config = scheduler.config
    assert config.prediction_type == prediction.kind
    assert not config.get("clip_sample")
    assert not config.get("set_alpha_to_one")
    assert config.get("steps_offset", 1) == 1
    spacing = "trailing" if prediction == ZERO_TERMINAL else "leading"
    assert config.get("timestep_spacing", spacing) == spacing


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_diffusers_reads_the_process_from_its_configuration(prediction):
    scheduler = DDIMScheduler(**scheduler_config(prediction))
    assert torch.equal(scheduler.alphas_cumprod, DDPM(prediction).alphas_cumprod)
    assert scheduler.config.prediction_type == prediction.kind


@pytest.mark.parametrize(("prediction", "steps"), [*zip(PREDICTIONS, [20] * 4, strict=True), (ZERO_TERMINAL, 61)])
@pytest.mark.parametrize("name", DISTINCT)
def test_schedulers_walk_from_noise_to_the_picture(name, prediction, steps):
    """With a denoiser that knows the picture, every sampler arrives at it: no clipping, no noise left over."""
    picture = 3 * torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    latents = _walk(name, prediction, steps, lambda noisy, alpha_bar: picture)
    assert (latents - picture).abs().mean() < 0.1


@pytest.mark.parametrize("name", DISTINCT)
def test_both_predictions_paint_the_same(name):
    # PNDM extrapolates what is predicted, and so differs
    tolerance = 0.3 if name == "pndm" else 1e-3
    epsilon, v = (_walk(name, prediction, 20, _of_bright_pictures) for prediction in (EPSILON, V_PREDICTION))
    torch.testing.assert_close(v, epsilon, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", DISTINCT)
def test_from_no_signal_pictures_become_as_bright_as_they_should(name):
    """Of pictures with mean 2: otherwise 1.9 and less, as the noise that painting starts from has mean 0."""
    latents = _walk(name, ZERO_TERMINAL, 40, _of_bright_pictures)
    assert abs(latents.mean() - 2) < 0.05
    assert 0.6 < latents.std() < 0.8


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
@pytest.mark.parametrize("name", DISTINCT)
def test_an_untrained_denoiser_paints_finite_pictures(name, prediction, steps):
    generator = torch.Generator().manual_seed(0)

    def guess_the_noise(noisy: Tensor, alpha_bar: float) -> Tensor:
        return (noisy - (1 - alpha_bar) ** 0.5 * torch.randn(noisy.shape, generator=generator)) / alpha_bar**0.5

    assert _walk(name, prediction, steps, guess_the_noise).isfinite().all()


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("prediction", [EPSILON, ZERO_TERMINAL], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 61, 466, MAX_STEPS])
def test_every_number_of_steps_stays_within_the_training_schedule(name, prediction, steps):
    scheduler = make_scheduler(name, DDPM(prediction))
    set_timesteps(scheduler, steps)
    assert min(scheduler.timesteps) >= 0
    if prediction == ZERO_TERMINAL:
        assert max(scheduler.timesteps) == 999
    else:
        assert 500 <= max(scheduler.timesteps) <= 999 or steps == 1


def _of_bright_pictures(noisy: Tensor, alpha_bar: float) -> Tensor:
    """The best guess at the picture, of pictures whose every value is normal with mean 2 and deviation 0.7."""
    signal = alpha_bar**0.5
    return 2 + 0.49 * signal / (0.49 * alpha_bar + 1 - alpha_bar) * (noisy - signal * 2)


def _walk(name: str, prediction: Prediction, steps: int, denoise: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Paint latents (1, 4, 8, 8) with a denoiser (noisy latents, alpha_bar) -> picture, of the prediction's kind."""
    process, generator = DDPM(prediction), torch.Generator().manual_seed(0)
    scheduler = make_scheduler(name, process)
    set_timesteps(scheduler, steps)
    latents = torch.randn((1, 4, 8, 8), generator=generator) * scheduler.init_noise_sigma
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep).double()
        alpha_bar = _alpha_bar(process, float(timestep))
        signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        picture = denoise(noisy, alpha_bar)
        noise = (noisy - signal * picture) / spread
        answer = noise if prediction.kind == "epsilon" else signal * noise - spread * picture
        latents = scheduler.step(answer.float(), timestep, latents, **draws).prev_sample
    return latents.double()


def _alpha_bar(process: DDPM, timestep: float) -> float:
    """Between two training steps, as the samplers of second order take them: linear in log sigma."""
    alphas = process.alphas_cumprod.double().clamp(min=2**-24)
    sigmas = ((1 - alphas) / alphas).sqrt().log()
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
