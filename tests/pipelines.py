"""Diffusers' own pipeline around our modules, to compare pictures with."""

import warnings

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

from library.generation.prompts import PromptLine
from library.models.family import Family
from library.models.text import clip_tokenizer


def pipeline_of(model: Family, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The pipeline a user would assemble from the model's parts, whatever its family."""
    parts = {name: module for name, (module, _) in model.components().items()}
    parts["tokenizer"] = clip_tokenizer()
    if model.name == "sdxl":
        parts["tokenizer_2"] = padding_with_zeros(clip_tokenizer())
        # an empty negative prompt is a caption like others
        special = {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
        kind = StableDiffusionXLPipeline
    else:
        if model.name == "sd2":
            parts["tokenizer"] = padding_with_zeros(parts["tokenizer"])
        special = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind = StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = kind(**parts, **special, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def padding_with_zeros(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """As the tokenizers of OpenCLIP's encoders are published: the word of id 0 fills up."""
    tokenizer.pad_token = "!"
    return tokenizer


def picture_of(pipeline: DiffusionPipeline, request: PromptLine) -> np.ndarray:
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
