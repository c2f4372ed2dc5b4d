"""Plans -> batches: what a loader process does, and the loader itself."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from library.console import warn
from library.data import images
from library.data.buckets import Geometry
from library.data.cache import LatentsCache
from library.data.captions import compose
from library.data.config import DatasetConfig
from library.data.plan import BatchPlan, Item
from library.data.records import NOTHING_DECODES, Record, RecordTable
from library.errors import UserError
from library.randomness import generator
from library.transfer import to_device


@dataclass
class Batch:
    """One micro-batch of B examples."""

    plan: BatchPlan
    seeds: list[int]
    """Per example: the start of its random choices."""
    records: list[int]
    """Per example: its index in the table."""
    captions: list[str]
    images: torch.Tensor | None
    """(B, 3, H, W) float32 in -1..1, or None if there are latents"""
    latents: torch.Tensor | None
    """(B, C, h, w) float32, unscaled, or None"""
    sizes: torch.Tensor
    """(B, 6) float32: original height and width, crop top and left, target height and width"""
    loss_mask: torch.Tensor | None
    """(B, 1, h, w) float32 factors of the loss, or None"""
    weights: torch.Tensor
    """(B,) float32 factors of the loss; 0 for what must not train"""
    failures: dict[int, str] = field(default_factory=dict)
    """What is wrong with records that could not be used, by their index in the table."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory. The DataLoader looks for a method of this name."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)})


@dataclass
class _Example:
    record: Record
    caption: str
    pixels: torch.Tensor
    """Image (3, H, W) or latents (C, h, w)"""
    size: tuple[int, ...]
    weight: float


class ImageDataset(Dataset):
    """`dataset[plan]` is the plan's Batch: a function of the plan and the files alone, whichever process asks."""

    def __init__(
        self,
        table: RecordTable,
        datasets: Sequence[DatasetConfig],
        latents: LatentsCache | None = None,
        *,
        prior_loss_weight: float = 1.0,
    ):
        self.table = table
        self.datasets = datasets
        self.latents = latents
        self.prior_loss_weight = prior_loss_weight
        self._buckets = [dataset.buckets() for dataset in datasets]

    def __getitem__(self, plan: BatchPlan) -> Batch:
        failures: dict[int, str] = {}
        examples = [self._try_example(item, failures) for item in plan.items]
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
            sizes=torch.tensor([example.size for example in examples], dtype=torch.float32),
            loss_mask=None,
            weights=torch.zeros_like(weights) if plan.filler else weights,
            failures=failures,
        )

    def _try_example(self, item: Item, failures: dict[int, str]) -> _Example | None:
        record = self.table[item.record]
        subset = self.datasets[record.dataset].subsets[record.subset]
        geometry = self._buckets[record.dataset].choose((record.width, record.height))
        flipped = subset.flip_aug and generator(item.seed, "augment").random() < 0.5
        try:
            pixels = self._pixels(record, geometry, flipped)
        except images.BrokenImage as problem:
            failures[record.index] = f"{record.path} cannot be decoded and is not trained on: {problem}"
            return None
        if pixels is None:  # said when the latents were cached
            return None
        caption = compose(
            record.caption,
            separator=subset.caption_separator,
            keep_tokens=subset.keep_tokens,
            shuffle=subset.shuffle_caption,
            rng=generator(item.seed, "caption"),
        )
        weight = self.prior_loss_weight if subset.is_reg else 1.0
        return _Example(record, caption, pixels, size_conditioning(record, geometry, flipped), weight)

    def _pixels(self, record: Record, geometry: Geometry, flipped: bool) -> torch.Tensor | None:
        if self.latents is not None:
            return self.latents.latents(record, flipped)
        image = images.example(record.path, geometry)
        return torch.from_numpy(images.to_model_range(images.flip(image) if flipped else image))

    def _blank(self, plan: BatchPlan) -> _Example:
        record = self.table[plan.items[0].record]
        shape = (3, *plan.bucket[::-1]) if self.latents is None else self.latents.shape(plan.bucket)
        geometry = self._buckets[record.dataset].choose((record.width, record.height))
        return _Example(record, "", torch.zeros(shape), size_conditioning(record, geometry, False), 0.0)


def size_conditioning(record: Record, geometry: Geometry, flipped: bool) -> tuple[int, ...]:
    """(original height, width, crop top, left, target height, width): what SDXL is told about an example."""
    left, top, right, _ = geometry.crop_ltrb
    width, height = geometry.bucket
    return record.height, record.width, int(top), int(width - right if flipped else left), height, width


class BatchLoader(DataLoader):
    """A DataLoader that tells the user of unusable files, in the main process and once each, and collects them.

    Raises UserError when there is nothing left but regularisation images.
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
                warn(failure)
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
    """One thread per worker; Ctrl-C is for the main process, which still needs batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
