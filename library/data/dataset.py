"""Plans -> batches: what a loader process does, and the loader itself."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from library.console import warn
from library.data import captions, images
from library.data.batch import Batch
from library.data.buckets import Geometry
from library.data.caching.cache import LatentsCache
from library.data.caching.text_cache import TextCache
from library.data.config import DatasetConfig, SubsetConfig, with_alpha_masks
from library.data.plan import BatchPlan, Item
from library.data.records import NOTHING_DECODES, Record, RecordTable, geometry_of
from library.errors import UserError
from library.randomness import generator


@dataclass
class _Example:
    record: Record
    caption: str
    pixels: torch.Tensor
    """Image (3, H, W) or latents (C, h, w)"""
    mask: np.ndarray | None
    """(h, w) float32 in 0..1"""
    text: dict[str, torch.Tensor] | None
    size: tuple[int, ...]
    weight: float


class ImageDataset(Dataset):
    """`dataset[plan]` is the plan's Batch: a function of the plan and the files alone, whichever process asks."""

    def __init__(
        self,
        table: RecordTable,
        datasets: Sequence[DatasetConfig],
        latents: LatentsCache | None = None,
        text: TextCache | None = None,
        *,
        latent_factor: int = 8,
        masked_loss: bool = False,
        prior_loss_weight: float = 1.0,
        total_steps: int = 1,
        templates: Sequence[str] = (),
    ):
        """`latent_factor`: pixels per latent, each way. `masked_loss`: whether mask files are used. `total_steps`: of
        the run, for token warm-up. `templates`: what is trained instead of the captions, except on regularisation
        images.
        """
        self.table = table
        self.datasets = datasets
        self.latents = latents
        self.text = text
        self.latent_factor = latent_factor
        self.masked_loss = masked_loss
        self.prior_loss_weight = prior_loss_weight
        self.total_steps = total_steps
        self.templates = tuple(templates)
        self._buckets = [dataset.buckets() for dataset in datasets]

    @property
    def uses_masks(self) -> bool:
        """Whether losses of parts of images may count less than those of others."""
        return self.masked_loss or with_alpha_masks(self.datasets)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        failures: dict[int, str] = {}
        examples = [self._try_example(item, plan, failures) for item in plan.items]
        sound = [example for example in examples if example is not None]
        # A batch keeps its shape: another of its images, or a blank, sits where one is missing, and weighs nothing.
        stand_in = replace(sound[0], weight=0.0) if sound else self._blank(plan)
        examples = [example or stand_in for example in examples]
        pixels = torch.stack([example.pixels for example in examples])
        weights = torch.tensor([example.weight for example in examples], dtype=torch.float32)
        return Batch(
            plan=plan,
            seeds=[item.seed for item in plan.items],
            records=[example.record.index for example in examples],
            captions=[example.caption for example in examples],
            images=pixels if self.latents is None else None,
            latents=None if self.latents is None else pixels,
            text=None if self.text is None else _stack([example.text for example in examples]),
            sizes=torch.tensor([example.size for example in examples], dtype=torch.float32),
            loss_mask=self._loss_mask(plan, [example.mask for example in examples]),
            weights=torch.zeros_like(weights) if plan.filler else weights,
            network_multiplier=self.datasets[plan.dataset].network_multiplier,
            custom_attributes=[self._subset(example.record).custom_attributes for example in examples],
            failures=failures,
        )

    def _subset(self, record: Record) -> SubsetConfig:
        return self.datasets[record.dataset].subsets[record.subset]

    def _try_example(self, item: Item, plan: BatchPlan, failures: dict[int, str]) -> _Example | None:
        record = self.table[item.record]
        subset = self._subset(record)
        geometry = geometry_of(record, self._buckets[record.dataset])
        try:
            pixels, mask, flipped = self._pixels(record, geometry, subset, item)
            caption, text = self._caption(record, subset, item, plan)
        except images.BrokenImage as problem:
            failures[record.index] = f"{record.path} cannot be used and is not trained on: {problem}"
            return None
        if pixels is None:  # said when the latents were cached
            return None
        weight = subset.weight * (self.prior_loss_weight if subset.is_reg else 1.0)
        return _Example(record, caption, pixels, mask, text, size_conditioning(record, geometry, flipped), weight)

    def _caption(
        self, record: Record, subset: SubsetConfig, item: Item, plan: BatchPlan
    ) -> tuple[str, dict[str, torch.Tensor] | None]:
        """This use's caption, and what the text encoders say of it where that is cached."""
        rng = generator(item.seed, "caption")
        if self.text is not None:
            dropped = captions.is_dropped(subset.captions, rng=rng, epoch=plan.epoch)
            caption = "" if dropped else captions.fixed(record.caption, subset.captions)
            return caption, self.text.outputs(record, dropped)
        caption = captions.compose(
            record.caption,
            subset.captions,
            rng=rng,
            epoch=plan.epoch,
            step=plan.step,
            total_steps=self.total_steps,
            templates=() if subset.is_reg else self.templates,
        )
        return caption, None

    def _pixels(
        self, record: Record, geometry: Geometry, subset: SubsetConfig, item: Item
    ) -> tuple[torch.Tensor | None, np.ndarray | None, bool]:
        """(image or latents, mask (H, W) in pixels, whether mirrored)."""
        mask_path = record.mask if self.masked_loss else ""
        rng = generator(item.seed, "augment")
        if self.latents is None:
            example = images.example(record.path, geometry, subset.images, rng, mask_path)
            return torch.from_numpy(images.to_model_range(example.image)), example.mask, example.flipped
        flipped = images.flips(subset.images, rng)
        mask = images.mask(mask_path, geometry, (record.width, record.height), subset.images) if mask_path else None
        if subset.images.alpha_mask:
            mask = images.product(mask, self.latents.alpha_mask(record))
        if mask is not None and flipped:
            mask = images.flip(mask)
        return self.latents.latents(record, flipped), mask, flipped

    def _loss_mask(self, plan: BatchPlan, masks: list[np.ndarray | None]) -> torch.Tensor | None:
        """(B, 1, h, w) where any example has a mask: those without have ones."""
        if all(mask is None for mask in masks):
            return None
        size = (plan.bucket[0] // self.latent_factor, plan.bucket[1] // self.latent_factor)
        ones = np.ones(size[::-1], dtype=np.float32)
        small = [ones if mask is None else images.latent_mask(mask, size) for mask in masks]
        return torch.from_numpy(np.stack(small))[:, None]

    def _blank(self, plan: BatchPlan) -> _Example:
        record = self.table[plan.items[0].record]
        shape = (3, *plan.bucket[::-1]) if self.latents is None else self.latents.shape(plan.bucket)
        geometry = geometry_of(record, self._buckets[record.dataset])
        text = None if self.text is None else self.text.outputs(record, True)
        return _Example(
            record, "", torch.zeros(shape), None, text, size_conditioning(record, geometry, False), weight=0.0
        )


def _stack(outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {kind: torch.stack([output[kind] for output in outputs]) for kind in outputs[0]}


def size_conditioning(record: Record, geometry: Geometry, flipped: bool) -> tuple[int, ...]:
    """(original height, width, crop top, left, target height, width): what SDXL is told about an example."""
    left, top, right, _ = geometry.crop_ltrb
    width, height = geometry.bucket
    return record.height, record.width, int(top), int(width - right if flipped else left), height, width


class BatchLoader(DataLoader):
    """A DataLoader that tells the user of unusable files, once each, and collects them.

    Raises UserError when there is nothing left but regularisation images, or a folder of images is gone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.failures: set[int] = set()
        self._usable = self.dataset.table.training(self.dataset.datasets)

    @property
    def left_out(self) -> int:
        """How many images could not be used so far."""
        latents = self.dataset.latents
        return len(self.failures) + (0 if latents is None else latents.left_out)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            for record, failure in batch.failures.items():
                folder = os.path.dirname(self.dataset.table[record].path)
                if not os.path.isdir(folder):
                    raise UserError(f"the folder {folder} is gone, so the training cannot go on: put it back")
                warn(failure, of_any_process=True)
                self.failures.add(record)
                self._usable[record] = False
            if batch.failures and not self._usable.any():
                raise UserError(NOTHING_DECODES)
            yield batch


def make_loader(
    dataset: ImageDataset, sampler: Iterable[BatchPlan], workers: int, *, pin_memory: bool = False
) -> BatchLoader:
    """Batches in the sampler's order, whatever the number of workers; 0 makes them in this process.

    `pin_memory` puts them into page-locked memory, from which a GPU fetches them while it computes.
    """
    return BatchLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        worker_init_fn=_set_up_worker,
        pin_memory=pin_memory,
    )


def _set_up_worker(_worker: int) -> None:
    """One thread per worker; what a terminal or a scheduler sends to all processes of a run is for the main process,
    which still needs batches to finish its step.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
