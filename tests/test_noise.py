import json
from pathlib import Path

import pytest
import torch

from library.models.noise import DDPM, sample_noise, torch_generator

GOLDEN = json.loads((Path(__file__).parent / "data/golden/objective.json").read_text())
TIMESTEPS = torch.tensor(GOLDEN["timesteps"])


def test_golden_alphas():
    process = DDPM()
    assert process.alphas_cumprod.dtype == torch.float32
    assert process.alphas_cumprod.shape == (1000,)
    assert torch.equal(process.alphas_cumprod[TIMESTEPS], torch.tensor(GOLDEN["alphas_cumprod"]))


def test_golden_snr():
    torch.testing.assert_close(DDPM().snr(TIMESTEPS), torch.tensor(GOLDEN["snr"]), rtol=1e-6, atol=0)


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
    assert DDPM().target(torch.zeros_like(noise), noise, torch.tensor([3])) is noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_keep_their_dtype(dtype):
    latents = torch.zeros(1, 4, 2, 2, dtype=dtype)
    assert DDPM().add_noise(latents, latents, torch.tensor([3])).dtype == dtype


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
