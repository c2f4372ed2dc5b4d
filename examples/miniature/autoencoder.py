"""Trains the miniature's autoencoder (AutoencoderKL, factor 8) on drawn scenes and on random polygons.

The latents are then whitened by folding a linear map into the two 1x1 convolutions around them, so that they have the
mean 0 and the standard deviation 1 / 0.18215 that Stable Diffusion's fixed latent scale expects.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from examples.miniature.configs import TRAINED_VAE
from examples.miniature.shapes import coverage, draw, paint_over, random_scene

LATENT_SCALE = 0.18215
POSTERIOR = 0.05  # standard deviation of the finished encoder's draws, relative to that of the latents


def random_polygons(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Up to three star-shaped blobs in any colours, so that the autoencoder also learns what no caption names."""
    picture = np.empty((size[1], size[0], 3), np.float32)
    picture[:] = rng.integers(0, 256, 3)
    for _ in range(rng.integers(1, 4)):
        harmonics = rng.normal(0, 0.25, (2, 4)) / np.arange(1, 5)
        corners = rng.integers(1, 6, 4)

        def blob(u: np.ndarray, v: np.ndarray, harmonics=harmonics, corners=corners) -> np.ndarray:
            angle = np.arctan2(v, u)
            waves = corners[:, None, None] * angle
            edge = 0.8 + (harmonics[0][:, None, None] * np.cos(waves)).sum(0)
            return np.hypot(u, v) <= edge + (harmonics[1][:, None, None] * np.sin(waves)).sum(0)

        cover = coverage(blob, size, rng.uniform(0.15, 0.4), tuple(rng.uniform(-0.3, 0.3, 2)), oversample=3)
        picture = paint_over(picture, cover, rng.integers(0, 256, 3))
    return picture.round().astype(np.uint8)


def batch(rng: np.random.Generator, count: int, polygons: float = 0.35) -> torch.Tensor:
    """Pictures of one size, (count, 3, H, W) float32 in -1..1."""
    size = random_scene(rng).size
    pictures = [
        random_polygons(rng, size) if rng.random() < polygons else draw(random_scene(rng, size=size))
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def window(rng: np.random.Generator, images: torch.Tensor, side: int = 32) -> torch.Tensor:
    """A random part of the pictures, (B, 3, side, side): as good for colours and edges, at a quarter of the cost."""
    top, left = (int(rng.integers(0, length - side + 1)) for length in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """The reconstruction's error, and the posterior's divergence from a standard normal one."""
    posterior = vae.encode(images).latent_dist
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return reconstruction(vae.decode(posterior.sample()).sample.float(), images) + kl_weight * divergence


def reconstruction(painted: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Absolute error of the pixels and squared error of 8x8 averages, which is what the eye sees as colour."""
    return F.l1_loss(painted, images) + F.mse_loss(F.avg_pool2d(painted, 8), F.avg_pool2d(images, 8))


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Makes the latents independent, with standard deviation 1 / LATENT_SCALE, by way of the two quant convolutions."""
    means, logvar = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)
    flat = means.permute(1, 0, 2, 3).flatten(1).double()
    centre = flat.mean(1)
    noise = torch.diag(logvar.double().exp().mean((0, 2, 3)))
    values, vectors = torch.linalg.eigh(torch.cov(flat) + noise)
    forward = vectors.T / values.sqrt()[:, None] / LATENT_SCALE
    backward = torch.linalg.inv(forward)

    encode, decode = vae.quant_conv, vae.post_quant_conv
    weight, bias = encode.weight[:, :, 0, 0].double(), encode.bias.double()
    encode.weight[:4] = (forward @ weight[:4])[:, :, None, None].float()
    encode.bias[:4] = (forward @ (bias[:4] - centre)).float()
    # A posterior as narrow as this leaves the denoiser nothing to learn that cannot be learned.
    encode.weight[4:] = 0
    encode.bias[4:] = 2 * math.log(POSTERIOR / LATENT_SCALE)
    inner = decode.weight[:, :, 0, 0].double()
    decode.bias += (inner @ centre).float()
    decode.weight.copy_((inner @ backward)[:, :, None, None].float())


@torch.no_grad()
def rescale(vae: AutoencoderKL, factor: float) -> None:
    """Multiplies the latents with `factor`, by way of the two quant convolutions; pictures come out as before."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * math.log(factor)  # the logarithm of the posterior's variance
    vae.post_quant_conv.weight /= factor


class Stage(NamedTuple):
    """A part of the autoencoder's training; each starts a cosine of the learning rate anew."""

    minutes: float
    rate: float
    kl_weight: float
    polygons: float  # share of pictures that are no scenes
    windows: float  # share of the stage that is spent on windows of the pictures


STAGES = (Stage(30, 1e-3, 1e-3, 0.35, 0.5), Stage(13, 7e-4, 2e-4, 0.2, 0.0))


def train(target: Path, stages: Sequence[Stage] = STAGES, seed: int = 0, batch_size: int = 8) -> AutoencoderKL:
    """Trains through the stages and writes the whitened autoencoder's weights to `target`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(**TRAINED_VAE)
    for number, stage in enumerate(stages):
        optimise(vae, functools.partial(_stage_loss, vae, rng, stage, number == 0, batch_size), stage, target.stem)
    whiten(vae, batch(rng, 128, polygons=0.0))
    torch.save(vae.state_dict(), target)
    return vae


def _stage_loss(
    vae: AutoencoderKL,
    rng: np.random.Generator,
    stage: Stage,
    fresh: bool,
    batch_size: int,
    step: int,
    progress: float,
) -> torch.Tensor:
    if progress < stage.windows:
        images = window(rng, batch(rng, 2 * batch_size, stage.polygons))
    else:
        images = batch(rng, batch_size, stage.polygons)
    return loss(vae, images, stage.kl_weight * (min(1.0, step / 500) if fresh else 1.0))


def refine_decoder(
    vae: AutoencoderKL, target: Path, minutes: float, seed: int = 1, batch_size: int = 8, rate: float = 5e-4
) -> None:
    """Goes on with the decoder alone, mostly on scenes and from slightly noisy latents, such as a denoiser leaves.

    The latents stay what they are, so this can run while the U-Net trains on them.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def step_loss(step: int, progress: float) -> torch.Tensor:
        images = batch(rng, batch_size, polygons=0.2)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        latents = latents + torch.randn_like(latents) * 0.05 / LATENT_SCALE
        return reconstruction(vae.decode(latents).sample.float(), images)

    optimise(vae, step_loss, Stage(minutes, rate, 0.0, 0.2, 0.0), target.stem)
    torch.save(vae.state_dict(), target)


def optimise(vae: AutoencoderKL, step_loss: Callable[[int, float], torch.Tensor], stage: Stage, name: str) -> None:
    """Lowers `step_loss(step, progress)` for the stage's time with AdamW and a cosine rate."""
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.95), weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (stage.minutes * 60)) < 1:
        warm_up = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = (
            stage.rate * warm_up * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        )
        # The last fifth runs in full precision: bfloat16 is too coarse for the final colours.
        with torch.autocast("cpu", torch.bfloat16, enabled=progress < 0.8):
            value = step_loss(step, progress)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{name} step {step}, {progress:.0%}, loss {value.item():.4f}", flush=True)
    vae.eval()
