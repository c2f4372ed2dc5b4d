"""Noise that is not the same in all frequencies: with an offset per channel, or of several resolutions. Pure functions
of what was drawn, and the draws, each from a stream of its own of the sample's seed, on the CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.noise import torch_generator


def strengths(limit: float, seeds: Sequence[int], stream: str, *, random: bool) -> Tensor:
    """(B,) float32 on the CPU: `limit` for each sample or, if `random`, drawn for each between 0 and it."""
    if not random:
        return torch.full((len(seeds),), limit)
    return limit * torch.stack([torch.rand((), generator=torch_generator(seed, stream)) for seed in seeds])


def normal(shape: Sequence[int], seeds: Sequence[int], stream: str) -> Tensor:
    """Standard normal numbers (B, *shape), float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=torch_generator(seed, stream)) for seed in seeds])


def offset(draws: Tensor, strength: Tensor, latents: Tensor, adaptive: float = 0.0) -> Tensor:
    """What to add to noise, (B, C, 1, 1): the same for all of a channel (Guttenberg 2023,
    crosslabs.org/blog/diffusion-with-offset-noise).

    `draws` (B, C, 1, 1) are standard normal, `strength` is (B,). `adaptive` times the absolute mean of each channel of
    the latents (B, C, h, w) is added to the strength, which does not go below 0 for it.
    """
    strength = strength.view(-1, 1, 1, 1)
    if adaptive:
        strength = (strength + adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    return strength * draws


def coarser(shape: Sequence[int], iterations: int, discount: float, seed: int) -> Tensor:
    """The resolutions that are to be added to a sample's noise, (C, h, w) float32 on the CPU (Whitaker 2023,
    wandb.ai/johnowhitaker/multires_noise): normal noise of size / r^i for i < `iterations`, with r drawn anew between 2
    and 4, enlarged to `shape` and times `discount`^i, down to the first that is one value high or wide.
    """
    channels, height, width = shape
    generator = torch_generator(seed, "resolutions of noise")
    total = torch.zeros(channels, height, width)
    for number in range(iterations):
        ratio = (2 + 2 * torch.rand((), generator=generator).item()) ** number
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        layer = torch.randn(1, channels, *size, generator=generator)
        total += F.interpolate(layer, (height, width), mode="bilinear")[0] * discount**number
        if 1 in size:
            break
    return total


def unit_deviation(noise: Tensor) -> Tensor:
    """Each sample (B, C, h, w) divided by the standard deviation of all its values."""
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)
