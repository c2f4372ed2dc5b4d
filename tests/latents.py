"""A stand-in for a VAE, and latents made with it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d

from library.data.caching.cache import LatentsCache, make_latents
from library.data.caching.latents_file import LatentsLayout
from library.data.caching.latents_plan import plan_latents
from library.data.config import DatasetConfig
from library.data.records import RecordTable, scan

LAYOUT = LatentsLayout(suffix="_sd.npz", channels=4, factor=8, fingerprint="this VAE")


def encode(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """(B, 4, H/8, W/8), with a draw per seed."""
    means = avg_pool2d(images, 8)
    draws = [torch.randn(4, *means.shape[2:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat([means, means.mean(1, keepdim=True)], 1) + torch.stack(draws)


def cache_latents(
    table: RecordTable, datasets: Sequence[DatasetConfig], encode: Callable = encode, batch_size: int = 1
) -> LatentsCache:
    """Latents in the temporary folder."""
    return make_latents(plan_latents(table, datasets, LAYOUT), encode, batch_size=batch_size)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of latents in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


class Disk:
    """Caches the datasets' latents to the disk; counts the images that are encoded for it."""

    def __init__(self, *datasets: DatasetConfig):
        self.datasets = datasets
        self.encoded = 0

    def encode(self, images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        self.encoded += len(images)
        return encode(images, seeds)

    def cache(self, batch_size: int = 2, layout: LatentsLayout = LAYOUT, to_disk: bool = True, **how) -> LatentsCache:
        """Scans anew, as another run does. `how` is for `plan_latents`."""
        self.table = scan(self.datasets)
        self.plan = plan_latents(self.table, self.datasets, layout, to_disk=to_disk, **how)
        self.encoded = 0
        return make_latents(self.plan, self.encode, batch_size=batch_size)
