"""Diffusers' own pipeline around our modules, to compare pictures with."""

import warnings

import numpy as np
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from PIL import Image

from library.generation.prompts import PromptLine
from library.models.family import Family
from library.models.text import clip_tokenizer


def pipeline_of(model: Family, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
    """The pipeline a user would assemble from the model's parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoders[0].model,
            tokenizer=clip_tokenizer(),
            unet=model.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_of(pipeline: StableDiffusionPipeline, request: PromptLine) -> np.ndarray:
    """What the pipeline paints for a request, (H, W, 3) integers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        picture = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.sample_steps,
            guidance_scale=request.scale,
            generator=torch.Generator().manual_seed(request.seed),
        ).images[0]
    return pixels(picture)


def pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) integers, whose differences do not wrap around."""
    return np.asarray(picture).astype(int)
