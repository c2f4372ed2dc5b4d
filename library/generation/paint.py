"""From a prompt to a picture: classifier-free guidance around a family's denoiser.

Painting looks and does not touch: all randomness comes from a generator made of the picture's own seed, and modules
leave as they came. The same request therefore gives the same picture in the middle of a training run, from the file
saved at that step, and from Diffusers' pipeline with a CPU generator of that seed.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from library.console import notice, warn
from library.generation.prompts import PromptLine
from library.generation.samplers import make_scheduler, set_timesteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from library.models.family import Family, LatentSpec

DEFAULT_STEPS = 30
DEFAULT_SCALE = 7.5


def paint(
    model: "Family",
    request: PromptLine,
    *,
    default_sampler: str = "ddim",
) -> Image.Image:
    """Paint one picture with the model as it is, on its device and in its precision.

    What the request leaves open: no negative prompt, 30 steps, scale 7.5, `default_sampler` and the model's own size
    (512x512, SDXL 1024x1024). Sizes are rounded down to what the model can do. A scale of 1 or less paints without
    guidance, as in Diffusers. Weights in prompts, as in `(word:1.3)`, are heeded. The request must have a seed
    (ValueError). Raises UserError for an unknown sampler.

    Guidance: Ho and Salimans, Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598
    """
    if request.seed is None:
        raise ValueError("a picture needs a seed: draw one and put it into the request")
    if request.control_image is not None:
        notice(f"the control image {request.control_image} is left out: there is no ControlNet to read it")
    scale = DEFAULT_SCALE if request.scale is None else request.scale
    width, height = _paintable_size(request, model.latents)
    generator = torch.Generator().manual_seed(request.seed)
    scheduler = make_scheduler(request.sampler or default_sampler, model.noise_process())
    device = next(model.unet.parameters()).device
    with torch.no_grad(), evaluating(model):
        captions = [request.prompt] if scale <= 1 else [request.negative_prompt or "", request.prompt]
        # as if the picture were a part of nothing larger
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(captions), dtype=torch.float32, device=device)
        condition = model.condition(model.encode_text(captions, painting=True), sizes)
        # Drawn on the CPU and kept in float32, so that device and precision of the model change nothing but roundings.
        shape = (1, model.latents.channels, height // model.latents.factor, width // model.latents.factor)
        noise = torch.randn(shape, generator=generator).to(device)
        set_timesteps(scheduler, request.sample_steps or DEFAULT_STEPS, device)
        latents = _denoise(model, scheduler, noise, condition, scale, generator)
        return _to_picture(model.decode_latents(latents / model.latents.scale))


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Put module trees into evaluation mode, and each of their modules back into its own mode afterwards."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _denoise(
    model: "Family",
    scheduler: "SchedulerMixin",
    noise: Tensor,
    condition: dict[str, Tensor],
    scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Noise (1, C, h, w) -> scaled latents (1, C, h, w), float32; conditions: (unconditional, conditional) or one."""
    # Ancestral samplers go on drawing from the generator that the initial noise came from.
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if draws else {}
    guided = scale > 1
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = model.denoise(noisy, timestep.expand(len(noisy)), condition).float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + scale * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
    return latents


def _paintable_size(request: PromptLine, latents: "LatentSpec") -> tuple[int, int]:
    """The requested (width, height), rounded down to multiples of the model's step; at least one step."""
    step = latents.step
    wanted = (request.width or latents.default_size, request.height or latents.default_size)
    width, height = (max(side // step, 1) * step for side in wanted)
    if (width, height) != wanted:
        notice(
            f"this model paints sizes that are multiples of {step}: {width}x{height} instead of {wanted[0]}x{wanted[1]}"
        )
    return width, height


def _to_picture(images: Tensor) -> Image.Image:
    """The first of images (B, 3, H, W) in -1..1 as an 8-bit RGB picture."""
    image = images[0].float()
    if not torch.isfinite(image).all():
        warn("a picture has values that are not finite, they are painted grey; a VAE in half precision can cause this")
        image = image.nan_to_num()
    pixels = (image / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
