import json
from pathlib import Path

import pytest
import torch

from library.models.noise import DDPM, Prediction, sample_noise, torch_generator

GOLDEN = json.loads((Path(__file__).parent / "data/golden/objective.json").read_text())
TIMESTEPS = torch.tensor(GOLDEN["timesteps"])
V_PREDICTION = Prediction("v_prediction")
ZERO_TERMINAL = Prediction("v_prediction", zero_terminal_snr=True)


def test_golden_alphas():
    process = DDPM()
    assert process.alphas_cumprod.dtype == torch.float32
    assert process.alphas_cumprod.shape == (1000,)
    assert torch.equal(process.alphas_cumprod[TIMESTEPS], torch.tensor(GOLDEN["alphas_cumprod"]))


def test_golden_snr():
    torch.testing.assert_close(DDPM().snr(TIMESTEPS), torch.tensor(GOLDEN["snr"]), rtol=1e-6, atol=0)


def test_golden_zero_terminal_snr():
    process = DDPM(ZERO_TERMINAL)
    assert torch.equal(process.alphas_cumprod[TIMESTEPS], torch.tensor(GOLDEN["zero_terminal_alphas_cumprod"]))
    snr = process.snr(torch.arange(process.steps))
    assert snr[-1] == 0
    assert (snr.diff() < 0).all()


def test_noisy_latents_have_the_variance_of_their_timestep():
    process = DDPM()
    latents = torch.full((3, 4, 2, 2), 2.0)
    timesteps = torch.tensor([0, 500, 999])
    without, only = process.add_noise(latents, torch.zeros_like(latents), timesteps), torch.ones_like(latents)
    alpha_bar = process.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    torch.testing.assert_close(without**2, 4 * alpha_bar.expand_as(latents))
    both = process.add_noise(torch.zeros_like(latents), only, timesteps) ** 2 + without**2 / 4
    torch.testing.assert_close(both, only)


def test_the_target_is_the_noise():
    noise = torch.randn(1, 4, 2, 2)
    assert DDPM().prediction_type == "epsilon"
    assert DDPM().target(torch.zeros_like(noise), noise, torch.tensor([3])) is noise


@pytest.mark.parametrize("prediction", [V_PREDICTION, ZERO_TERMINAL])
def test_v_is_perpendicular_to_the_noisy_latents(prediction):
    """Salimans and Ho 2022, appendix D: noisy latents and v are latents and noise, turned by one angle."""
    process = DDPM(prediction)
    latents, noise = torch.randn((2, 5, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    noisy, v = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    alpha_bar = process.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    cosine, sine = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    torch.testing.assert_close(cosine * noisy - sine * v, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(sine * noisy + cosine * v, noise, rtol=0, atol=1e-5)


def test_without_signal_v_is_the_latents_turned_round():
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    process, last = DDPM(ZERO_TERMINAL), torch.tensor([999])
    assert torch.equal(process.add_noise(latents, noise, last), noise)
    assert torch.equal(process.target(latents, noise, last), -latents)


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="'v'"):
        Prediction("v")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_keep_their_dtype(dtype):
    latents, process, timesteps = torch.zeros(1, 4, 2, 2, dtype=dtype), DDPM(V_PREDICTION), torch.tensor([3])
    assert process.add_noise(latents, latents, timesteps).dtype == dtype
    assert process.target(latents, latents, timesteps).dtype == dtype


def test_draws_belong_to_their_sample():
    """Neither the batch that a sample comes in nor the global generator matters."""
    process = DDPM()
    noise, timesteps = sample_noise((4, 8, 8), [1, 2, 3]), process.sample_timesteps([1, 2, 3])
    torch.manual_seed(5)
    assert torch.equal(sample_noise((4, 8, 8), [3])[0], noise[2])
    assert torch.equal(process.sample_timesteps([3, 1]), timesteps[[2, 0]])
    assert not torch.equal(noise[0], noise[1])


def test_timesteps_are_uniform_between_their_bounds():
    draws = DDPM().sample_timesteps(range(2000))
    assert draws.dtype == torch.int64
    assert 0 <= draws.min() < 10
    assert 990 <= draws.max() < 1000
    assert abs(draws.float().mean() - 499.5) < 25
    assert set(DDPM().sample_timesteps(range(200), 5, 8).tolist()) == {5, 6, 7}


def test_streams_of_a_sample_are_independent():
    noise, other = (torch.randn(8, generator=torch_generator(7, stream)) for stream in ("noise", "vae"))
    assert not torch.equal(noise, other)
