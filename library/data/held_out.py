"""The held-out images in batches that show the model the very same thing whenever they are looked at. No torch."""

from collections.abc import Sequence
from dataclasses import replace

from library.data.captions import CaptionOptions
from library.data.config import DatasetConfig, SubsetConfig
from library.data.plan import BatchPlan, Item
from library.data.records import RecordTable
from library.randomness import address

_WARMED_UP = 1  # both the step of the batches and the one at which they have all tags


def steady(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset without anything that changes from use to use, and with equal weights. Wildcards stay: the address of
    an image's caption is always the same, and so is what it draws.
    """
    return replace(dataset, subsets=tuple(map(_steady_subset, dataset.subsets)))


def _steady_subset(subset: SubsetConfig) -> SubsetConfig:
    images = replace(subset.images, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(subset, weight=1.0, captions=_steady_captions(subset.captions), images=images)


def _steady_captions(options: CaptionOptions) -> CaptionOptions:
    is_split = options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0
    return replace(
        options,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        # a warm-up that is over: the tags are still joined as in training, without the marks between them
        token_warmup_step=_WARMED_UP if is_split else 0,
    )


def held_out_batches(
    table: RecordTable, datasets: Sequence[DatasetConfig], limit: int | None = None
) -> list[BatchPlan]:
    """Batches of the datasets' sizes; of these at most `limit`, drawn by `validation_seed` from all of them."""
    batches = []
    for dataset, bucket, members in table.by_bucket(table.held_out):
        items = sorted((_item(table, datasets, record) for record in members.tolist()), key=lambda item: item.seed)
        size = datasets[dataset].batch_size
        for start in range(0, len(items), size):
            chosen = tuple(items[start : start + size])
            batches.append(
                BatchPlan(
                    epoch=1,
                    step=_WARMED_UP,
                    micro=0,
                    last_micro=False,
                    items=chosen,
                    bucket=bucket,
                    dataset=dataset,
                    images_in_step=len(chosen),
                    filler=False,
                    last_of_epoch=False,
                )
            )
    return sorted(batches, key=lambda batch: address("validation batch", batch.items[0].seed))[: limit or None]


def _item(table: RecordTable, datasets: Sequence[DatasetConfig], record: int) -> Item:
    dataset, subset = table.subsets[record].tolist()
    seed = datasets[dataset].subsets[subset].validation_seed or 0
    return Item(record, 0, address(seed, "held out", table.key(record)))
