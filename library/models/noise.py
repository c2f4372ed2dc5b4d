"""Noise processes: what noisy latents are, what the model learns to predict from them, and how both are drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from library.randomness import address


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one named stream of a sample. Drawing on the CPU makes every device see the same numbers."""
    return torch.Generator().manual_seed(address(seed, stream))


def sample_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU; each sample has its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=torch_generator(seed, "noise")) for seed in seeds])


class NoiseProcess(ABC):
    """The way from latents to noise. Latents here are scaled, as the denoiser sees them: (B, C, h, w)."""

    steps: int
    prediction_type: str

    @abstractmethod
    def sample_timesteps(self, seeds: Sequence[int], low: int = 0, high: int | None = None) -> Tensor:
        """One training timestep per sample, low <= t < high (by default any), (B,) int64 on the CPU."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, C, h, w) with the noise of their timesteps (B,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is to answer for `add_noise(latents, noise, timesteps)`, (B, C, h, w)."""

    @abstractmethod
    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio (of variances) at the timesteps, (B,) float32."""


class DDPM(NoiseProcess):
    """Denoising diffusion (Ho et al. 2020, arXiv:2006.11239) with Stable Diffusion's schedule: the square roots of the
    betas are equally spaced ("scaled linear"). The denoiser predicts the noise.

    `alphas_cumprod[t]` (float32, (steps,)) is the part of the latents' variance that is left at timestep t.
    """

    steps = 1000
    beta_start = 0.00085
    beta_end = 0.012
    beta_schedule = "scaled_linear"  # the name Diffusers' schedulers have for it
    prediction_type = "epsilon"

    def __init__(self) -> None:
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._by_device = {self.alphas_cumprod.device: self.alphas_cumprod}

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        # one copy of the table per device: copying it anew would stall the step
        if timesteps.device not in self._by_device:
            self._by_device[timesteps.device] = self.alphas_cumprod.to(timesteps.device)
        return self._by_device[timesteps.device][timesteps]

    def sample_timesteps(self, seeds: Sequence[int], low: int = 0, high: int | None = None) -> Tensor:
        """Uniform over low <= t < high."""
        high = self.steps if high is None else high
        draws = [torch.randint(low, high, (), generator=torch_generator(seed, "timestep")) for seed in seeds]
        return torch.stack(draws)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise (eq. 4), in the latents' dtype."""
        alpha_bar = self._alpha_bar(timesteps).view(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(latents.dtype) * latents + (1.0 - alpha_bar).sqrt().to(latents.dtype) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar)."""
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar / (1.0 - alpha_bar)
