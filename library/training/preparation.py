"""What is made before training, while the parts it needs are on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from library.data.caching.cache import LatentsCache, make_latents
from library.data.caching.latents_plan import LatentsPlan
from library.data.caching.text_cache import TextCache, cache_text
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.models.family import Family
from library.models.registry import ModelInfo
from library.options.cache import CacheOptions
from library.training import together
from library.training.caching import vae_encoder
from library.training.device.placement import Placement, leave
from library.training.text_caching import text_layout


@dataclass(frozen=True)
class Caches:
    """What is computed once; None where every step computes it anew."""

    latents: LatentsCache | None
    text: TextCache | None


@torch.no_grad()
def prepare_caches(
    options: CacheOptions,
    plan: LatentsPlan | None,
    info: ModelInfo,
    model: Family,
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    accelerator: Accelerator,
    placement: Placement,
    *,
    merged_text: str = "",
) -> Caches:
    """Encode what is to be cached and is not there yet. Encoders leave the device as `placement` says, once they are
    done. `merged_text`: of what is merged into the text encoders, see `text_layout`.
    """
    share = {
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "wait": together.wait,
    }
    latents = text = None
    if plan is not None:
        latents = make_latents(plan, vae_encoder(model), batch_size=options.vae_batch_size, **share)
        if placement.vae_rests:
            leave(model.vae)
    if options.text:
        text = cache_text(
            table,
            datasets,
            model.encode_text,
            text_layout(info, model.text, merged_text),
            to_disk=options.cache_text_encoder_outputs_to_disk,
            batch_size=options.text_encoder_batch_size,
            skip_check=options.skip_cache_check,
            **share,
        )
        if placement.text_encoders_rest:
            leave(model.text_encoders)
    return Caches(latents, text)
