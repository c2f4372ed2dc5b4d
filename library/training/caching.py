"""Latents made with a model's autoencoder: before training, and ahead of it."""

import os
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from library import console
from library.data import images
from library.data.caching.cache import Encode, Outcome, write_latents
from library.data.caching.latents_file import LatentsLayout
from library.data.caching.latents_plan import LatentsPlan, plan_latents
from library.data.config import DatasetConfig, check_resolutions
from library.data.records import NOTHING_DECODES, RecordTable, check_buckets, scan
from library.data.scanning.wording import counted
from library.devices import fastest_device
from library.errors import UserError, some
from library.models.family import Family
from library.models.registry import ModelInfo
from library.options.base import Settings
from library.options.cache import CacheOptions
from library.options.precision import PrecisionOptions
from library.options.saving import SaveOptions
from library.training.base_model import inspect_for_tool
from library.training.device import precision
from library.training.device.hardware import settle_precision
from library.training.device.memory import enough_for


def latents_layout(info: ModelInfo) -> LatentsLayout:
    """What a model's cached latents look like. Reads the weights of its autoencoder, once."""
    return LatentsLayout(info.family.latents_suffix, info.latents.channels, info.latents.factor, info.vae_fingerprint)


def vae_encoder(model: Family, flag: str = "--vae_batch_size") -> Encode:
    """Encodes images on whichever device the autoencoder is; as many at a time as `flag` says."""

    @torch.no_grad()
    def encode(pixels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        count, _, height, width = pixels.shape
        batch = f"encoding {counted(count, 'image', 'images')} of {width}x{height} at a time"
        with enough_for(batch, f"lower {flag}" if count > 1 else "choose a smaller resolution"):
            return model.encode_images(pixels, seeds).cpu()

    return encode


def plan_for_run(
    options: CacheOptions, info: ModelInfo, table: RecordTable, datasets: Sequence[DatasetConfig]
) -> LatentsPlan | None:
    """Which latents a run needs; None if it encodes its images as it goes.

    It does so without --cache_latents, unless there are latents made ahead at the sizes that the metadata names; those
    that are missing are then made for this run.
    """
    varied = any(images.varies(subset.images) for dataset in datasets for subset in dataset.subsets)
    prepared = not varied and all(table.predefined(number) for number in range(len(datasets)))
    if not options.latents and not prepared:
        return None
    plan = plan_latents(
        table,
        datasets,
        latents_layout(info),
        to_disk=options.cache_latents_to_disk,
        skip_check=options.skip_cache_check,
        recache_unknown=options.recache_unknown and options.latents,
    )
    return plan if options.latents or plan.missing < np.count_nonzero(plan.states) else None


def cache_ahead(settings: Settings, datasets: Sequence[DatasetConfig], *, skip_check: bool) -> None:
    """Write the files that are missing, this process's share of them, and print what came of it.

    The model is read only if one is missing. UserError if no image decodes, for latents that are not finite, and for
    files that cannot be written.
    """
    rank, world = console.rank(), int(os.environ.get("WORLD_SIZE", "1"))
    device = fastest_device()
    info = inspect_for_tool(settings)
    check_resolutions(datasets, info.latents.step)
    table = scan(datasets)
    check_buckets(table, datasets, info.latents.step)
    mixed = settle_precision(settings[PrecisionOptions].mixed_precision, device)
    options = settings[CacheOptions]
    plan = plan_latents(
        table,
        datasets,
        latents_layout(info),
        to_disk=True,
        skip_check=skip_check,
        recache_unknown=options.recache_unknown,
    )

    @cache
    def encoder() -> Encode:
        return vae_encoder(
            info.load_vae(precision.choose(settings[PrecisionOptions], settings[SaveOptions], mixed).vae, device)
        )

    def encode(pixels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        return encoder()(pixels, seeds)

    outcome = write_latents(plan, encode, batch_size=options.vae_batch_size, rank=rank, world=world)
    print(_report(outcome, device, rank, world), flush=True)
    if world == 1 and not outcome.written and not outcome.valid:
        raise UserError(NOTHING_DECODES)


def _report(outcome: Outcome, device: torch.device, rank: int, world: int) -> str:
    process = f"process {rank + 1} of {world} on {device}" if world > 1 else f"on {device}"
    failed = f"{len(outcome.failed)} failed" + (f" ({some(outcome.failed)})" if outcome.failed else "")
    return f"latents, {process}: {outcome.written} files written, {outcome.valid} valid already, {failed}"
