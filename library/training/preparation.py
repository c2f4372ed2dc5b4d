"""What is made before training, while the parts it needs are on the device."""

from collections.abc import Sequence

import torch

from library.data.cache import LatentsCache, cache_latents
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.models.family import Family
from library.options.cache import CacheOptions


@torch.no_grad()
def prepare_latents(
    options: CacheOptions, model: Family, table: RecordTable, datasets: Sequence[DatasetConfig]
) -> LatentsCache | None:
    """With --cache_latents, encode every image once; the autoencoder is then needed for previews only."""
    if not options.cache_latents:
        return None
    return cache_latents(
        table,
        datasets,
        lambda images, seeds: model.encode_images(images, seeds).cpu(),
        batch_size=options.vae_batch_size,
    )
