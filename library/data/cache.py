"""Latents computed once before training, shared with loader processes through one memory-mapped file."""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from library.console import rank, warn
from library.data import images
from library.data.buckets import Buckets, Size
from library.data.config import DatasetConfig
from library.data.records import NOTHING_DECODES, Record, RecordTable
from library.data.scratch import ScratchFolder
from library.errors import UserError
from library.randomness import address

Encode = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Images (B, 3, H, W) in -1..1 on the CPU, a seed for each one's posterior draw -> unscaled latents (B, C, h, w)."""


class LatentsCache:
    """Unscaled latents by record, mirrored ones too where the subset asks for mirroring. Pickled as its path."""

    def __init__(self, folder: Path, scratch: ScratchFolder | None = None):
        self.folder = folder
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._values = np.memmap(folder / "latents.bin", dtype=np.float32, mode="r")
        facts = json.loads((folder / "facts.json").read_text())
        self._channels: int = facts["channels"]
        self._factor: int = facts["factor"]
        self.left_out: int = facts["left_out"]
        """How many images could not be decoded."""
        self._scratch = scratch  # the last attribute is the last to go, after the maps of what is in the folder

    def __reduce__(self):
        return LatentsCache, (self.folder,)

    def shape(self, bucket: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a bucket (width, height in pixels)."""
        return self._channels, bucket[1] // self._factor, bucket[0] // self._factor

    def latents(self, record: Record, flipped: bool) -> torch.Tensor | None:
        """Unscaled latents (C, h, w) float32, a copy; None for an image that could not be decoded."""
        start = int(self._offsets[record.index, int(flipped)])
        if start < 0:
            return None
        shape = self.shape(record.bucket)
        return torch.from_numpy(self._values[start : start + int(np.prod(shape))].reshape(shape).copy())


def cache_latents(
    table: RecordTable, datasets: Sequence[DatasetConfig], encode: Encode, *, batch_size: int = 1
) -> LatentsCache:
    """Encodes every image in use, in groups of up to `batch_size` of one bucket that depend on the table alone.

    An image that does not decode is left out with a warning. Raises UserError if latents are not finite, if no image is
    left, or if the temporary folder is full.
    """
    scratch = ScratchFolder("latents")
    offsets = np.full((len(table), 2), -1, dtype=np.int64)
    facts = {}
    written = 0
    count = table.in_use
    bar = tqdm(total=count, desc="caching latents", unit="img", disable=rank() > 0)
    try:
        with bar, open(scratch.path / "latents.bin", "wb") as file:
            for bucket, records, flipped, latents in _encoded_groups(table, datasets, encode, batch_size):
                facts = {"channels": latents.shape[1], "factor": bucket[0] // latents.shape[3]}
                for record, values in zip(records, latents, strict=True):
                    offsets[record.index, int(flipped)] = written
                    written += values.size
                    file.write(values.tobytes())
                bar.update(0 if flipped else len(records))
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{scratch.path.parent} is full after the latents of {bar.n} of {count} images: free some space, or set "
            "the environment variable TMPDIR to a folder on a larger disk"
        ) from None
    cached = offsets[:, 0] >= 0
    if not cached[table.training(datasets)].any():
        raise UserError(NOTHING_DECODES)
    np.save(scratch.path / "offsets.npy", offsets)
    facts["left_out"] = count - int(np.count_nonzero(cached))
    (scratch.path / "facts.json").write_text(json.dumps(facts))
    return LatentsCache(scratch.path, scratch)


def _encoded_groups(
    table: RecordTable, datasets: Sequence[DatasetConfig], encode: Encode, batch_size: int
) -> Iterator[tuple[Size, list[Record], bool, np.ndarray]]:
    """(bucket, records, mirrored, latents (B, C, h, w)) for one group of images after the other."""
    for dataset, bucket, members in table.by_bucket():
        config = datasets[dataset]
        geometries = config.buckets()
        for start in range(0, len(members), batch_size):
            decoded = list(_decoded(table, members[start : start + batch_size], geometries))
            mirrored = [(record, images.flip(p)) for record, p in decoded if config.subsets[record.subset].flip_aug]
            for flipped, group in ((False, decoded), (True, mirrored)):
                if group:
                    records = [record for record, _ in group]
                    pixels = np.stack([images.to_model_range(p) for _, p in group])
                    yield bucket, records, flipped, _encode(encode, records, pixels, flipped)


def _decoded(table: RecordTable, indices: np.ndarray, geometries: Buckets) -> Iterator[tuple[Record, np.ndarray]]:
    """The records whose image decodes, with it: uint8 (H, W, 3) of the bucket's size."""
    for index in indices:
        record = table[index]
        try:
            yield record, images.example(record.path, geometries.choose((record.width, record.height)))
        except images.BrokenImage as problem:
            warn(f"{record.path} cannot be decoded and is not trained on: {problem}")


def _encode(encode: Encode, records: list[Record], pixels: np.ndarray, flipped: bool) -> np.ndarray:
    seeds = [address("vae", record.key, "flipped" if flipped else "") for record in records]
    latents = encode(torch.from_numpy(pixels), seeds).detach().float().cpu().numpy()
    for record, values in zip(records, latents, strict=True):
        if not np.isfinite(values).all():
            raise UserError(f"{record.path}: the VAE's latents for this image are not finite: use --no_half_vae")
    return latents
