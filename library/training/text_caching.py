"""Text encoder outputs in files beside the images, made ahead of training."""

from collections.abc import Sequence
from functools import cache

import torch

from library.data.caching.text_cache import TextFiles, TextLayout, write_text_files
from library.data.config import DatasetConfig
from library.data.records import scan
from library.errors import UserError, some
from library.models.family import Family
from library.models.prompt_weights import CHUNK
from library.models.registry import ModelInfo
from library.models.text import TextOptions
from library.options.base import Settings
from library.options.cache import CacheOptions
from library.options.model import ModelOptions
from library.training import together
from library.training.base_model import inspect_for_tool
from library.training.device.accelerator import make_accelerator


def text_options(settings: Settings) -> TextOptions:
    """How captions are to be read."""
    options = settings[ModelOptions]
    return TextOptions(
        options.max_token_length or CHUNK,
        options.clip_skip,
        options.weighted_captions,
        padded=not settings.flat().get("no_token_padding"),
    )


def text_layout(info: ModelInfo, text: TextOptions, merged: str = "") -> TextLayout:
    """How a model's text encoder outputs, for captions read like this, are kept. Reads its text encoders' weights,
    once. `merged`: a fingerprint of what is merged into them.
    """
    outputs = info.family.text_outputs
    encoders = f"{info.text_fingerprint} {merged}".rstrip()
    return TextLayout(outputs.suffix, outputs.arrays, encoders, text.token_length, text.clip_skip, text.weighted)


def cache_text_ahead(
    settings: Settings,
    datasets: Sequence[DatasetConfig],
    *,
    skip_check: bool,
) -> None:
    """Write the files that are missing, shared out among the processes, and print what came of it.

    The model is read only if one is missing. UserError for outputs that are not finite, and for files that cannot be
    written.
    """
    options = settings[CacheOptions]
    info = inspect_for_tool(settings)
    accelerator, formats = make_accelerator(settings, info.family)
    text = text_options(settings)

    @cache
    def model() -> Family:
        loaded = info.load(formats.frozen, "cpu")
        loaded.read_captions(text)
        loaded.text_encoders.to(accelerator.device)
        return loaded

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        return model().encode_text(captions)

    files = write_text_files(
        scan(datasets),
        datasets,
        encode,
        text_layout(info, text),
        batch_size=options.text_encoder_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        skip_check=skip_check,
    )
    total = TextFiles.together(together.gather(files))
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    total.report()
    print(
        f"text encoder outputs, on {accelerator.device.type}: {total.written} files written, "
        f"{total.valid} valid already, {total.closed.total()} failed",
        flush=True,
    )
    if total.closed:
        raise UserError(
            f"{some(sorted(total.closed))} cannot be written to: change that, or train with "
            "--cache_text_encoder_outputs, which needs no files"
        )
