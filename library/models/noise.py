"""Noise processes: what noisy latents are, what the model learns to predict from them, and how both are drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.randomness import address


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one named stream of a sample. Drawing on the CPU makes every device see the same numbers."""
    return torch.Generator().manual_seed(address(seed, stream))


def sample_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU; each sample has its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=torch_generator(seed, "noise")) for seed in seeds])


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts, and on which schedule.

    `kind` is named as Diffusers names it: "epsilon", the noise, or "v_prediction". With `zero_terminal_snr` nothing of
    the latents is left at the last timestep. Raises ValueError for another kind.
    """

    kind: str = "epsilon"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"there is no prediction of {self.kind!r}, only of epsilon and v_prediction")


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


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (steps,) whose last timestep has no signal left: the square roots of alpha_bar are shifted until the last
    is 0, then stretched until the first is what it was (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0], roots[-1]
    alpha_bar = ((roots - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


class DDPM(NoiseProcess):
    """Denoising diffusion (Ho et al. 2020, arXiv:2006.11239) with Stable Diffusion's schedule: the square roots of the
    betas are equally spaced ("scaled linear"). What the denoiser predicts is `prediction`'s to say.

    `alphas_cumprod[t]` (float32, (steps,)) is the part of the latents' variance that is left at timestep t.
    """

    steps = 1000
    beta_start = 0.00085
    beta_end = 0.012
    beta_schedule = "scaled_linear"  # the name Diffusers' schedulers have for it

    def __init__(self, prediction: Prediction = Prediction()) -> None:
        self.prediction = prediction
        self.prediction_type = prediction.kind
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float32) ** 2
        self.betas = zero_terminal_snr(betas) if prediction.zero_terminal_snr else betas
        # From the betas in either case, as Diffusers' schedulers do: so previews step through the very same numbers.
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
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
        """The noise itself, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents (Salimans and Ho 2022,
        arXiv:2202.00512), in the latents' dtype."""
        if self.prediction.kind == "epsilon":
            return noise
        alpha_bar = self._alpha_bar(timesteps).view(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(latents.dtype) * noise - (1.0 - alpha_bar).sqrt().to(latents.dtype) * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """alpha_bar / (1 - alpha_bar)."""
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar / (1.0 - alpha_bar)


def scheduler_config(prediction: Prediction) -> dict[str, Any]:
    """The part of a Diffusers scheduler's configuration that follows from the process, for previews and for models
    in Diffusers' layout. Some schedulers know nothing of the entries that zero terminal SNR adds."""
    config: dict[str, Any] = {
        "num_train_timesteps": DDPM.steps,
        "beta_start": DDPM.beta_start,
        "beta_end": DDPM.beta_end,
        "beta_schedule": DDPM.beta_schedule,
        "prediction_type": prediction.kind,
    }
    if prediction.zero_terminal_snr:
        config["rescale_betas_zero_snr"] = True
        # Only v says anything of the picture where no signal is left. So only with v do the steps begin at the very
        # last timestep; from predicted noise there, an error of a hundredth would become one of forty.
        if prediction.kind == "v_prediction":
            config["timestep_spacing"] = "trailing"
    return config
