"""The ss_* metadata that describes what was trained on."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from library.data.config import DatasetConfig, SubsetConfig
from library.data.plan import RunPlan
from library.data.records import RecordTable, SubsetReport
from library.data.scanning.scan import uses_per_epoch

TAGS_KEPT = 10_000  # of each folder: a model file's header may have 100 MB at most, or no program opens it

# What the entry of a dataset and the keys of a run with one dataset have in common.
_FLAT = (
    "batch_size_per_device",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_no_upscale",
    "bucket_info",
    "tag_frequency",
)


def dataset_metadata(table: RecordTable, datasets: Sequence[DatasetConfig], plan: RunPlan) -> dict[str, Any]:
    """The ss_* keys that describe the data, with plain Python values (nested ones are stored as JSON).

    With one dataset its options are keys of their own; with several they are in the list `ss_datasets`.
    """
    described = [_describe(table, plan, index, dataset) for index, dataset in enumerate(datasets)]
    metadata = {
        "ss_num_train_images": sum(facts["num_train_images"] for facts in described),
        "ss_num_reg_images": sum(facts["num_reg_images"] for facts in described),
        "ss_num_validation_images": sum(report.held_out for report in table.reports),
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
    }
    if len(datasets) > 1:
        return metadata | {"ss_datasets": described}
    dataset, facts = datasets[0], described[0]
    options = {name: facts[name] for name in _FLAT if name in facts}
    options |= {
        "resolution": str(dataset.resolution),
        "dataset_dirs": _folder_counts(table, datasets, is_reg=False),
        "reg_dataset_dirs": _folder_counts(table, datasets, is_reg=True),
        **_options_of_all(dataset.subsets),
    }
    return metadata | {f"ss_{name}": value for name, value in options.items()}


def _options_of_all(subsets: Sequence[SubsetConfig]) -> dict[str, Any]:
    """The subsets' options in the keys that have room for one value: the strongest of each."""
    captions, images = [subset.captions for subset in subsets], [subset.images for subset in subsets]
    return {
        "shuffle_caption": any(options.shuffle_caption for options in captions),
        "keep_tokens": max(options.keep_tokens for options in captions),
        "caption_dropout_rate": max(options.caption_dropout_rate for options in captions),
        "caption_dropout_every_n_epochs": max(options.caption_dropout_every_n_epochs for options in captions),
        "caption_tag_dropout_rate": max(options.caption_tag_dropout_rate for options in captions),
        "color_aug": any(options.color_aug for options in images),
        "flip_aug": any(options.flip_aug for options in images),
        "random_crop": any(options.random_crop for options in images),
        "face_crop_aug_range": _first(options.face_crop_aug_range for options in images),
        "resize_interpolation": _first(options.resize_interpolation for options in images),
        "validation_split": max(subset.validation_split for subset in subsets),
        "validation_seed": _first(subset.validation_seed for subset in subsets),
    }


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _describe(table: RecordTable, plan: RunPlan, index: int, dataset: DatasetConfig) -> dict[str, Any]:
    """One dataset as an entry of `ss_datasets`."""
    uses = [(uses_of_subset(table, index, number), subset.is_reg) for number, subset in enumerate(dataset.subsets)]
    in_buckets = dataset.enable_bucket or table.predefined(index)
    return {
        "is_dreambooth": dataset.subsets[0].metadata_file is None,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": sum(count for count, is_reg in uses if not is_reg),
        "num_reg_images": sum(count for count, is_reg in uses if is_reg),
        "resolution": dataset.resolution,
        "enable_bucket": in_buckets,
        "min_bucket_reso": dataset.min_bucket_reso if dataset.enable_bucket else None,
        "max_bucket_reso": dataset.max_bucket_reso if dataset.enable_bucket else None,
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "tag_frequency": _tag_frequency(table, index, dataset),
        "bucket_info": _bucket_info(table, plan, index) if in_buckets else None,
        "subsets": [
            _describe_subset(subset, _report(table, index, number).images)
            for number, subset in enumerate(dataset.subsets)
        ],
    }


def _describe_subset(subset: SubsetConfig, images: int) -> dict[str, Any]:
    captions = subset.captions
    facts = {
        "img_count": images,
        "num_repeats": whole(subset.num_repeats),
        "color_aug": subset.images.color_aug,
        "flip_aug": subset.images.flip_aug,
        "random_crop": subset.images.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix or None,
        "caption_suffix": captions.caption_suffix or None,
        "resize_interpolation": subset.images.resize_interpolation,
    }
    if subset.image_dir is not None:
        facts["image_dir"] = os.path.basename(os.path.abspath(subset.image_dir))
    if subset.metadata_file is not None:
        return facts | {"metadata_file": subset.metadata_file.name}
    return facts | {"class_tokens": subset.class_tokens or None, "is_reg": subset.is_reg}


def _bucket_info(table: RecordTable, plan: RunPlan, dataset: int) -> dict[str, Any]:
    """How many samples each bucket has per epoch, and the images' mean difference in aspect ratio from their bucket."""
    groups = [group for group in plan.groups if group.dataset == dataset]
    used = (table.subsets[:, 0] == dataset) & (table.repeats > 0)
    aspects, wanted = (column[used, 0] / column[used, 1] for column in (table.buckets, table.sizes))
    return {
        "buckets": {str(i): {"resolution": list(g.bucket), "count": g.samples} for i, g in enumerate(groups)},
        "mean_img_ar_error": float(np.abs(aspects - wanted).mean()) if used.any() else 0.0,
    }


def _tag_frequency(table: RecordTable, index: int, dataset: DatasetConfig) -> dict[str, dict[str, int]]:
    """By folder or metadata file: in how many of its images' captions each comma-separated tag is.

    Of each only the most frequent TAGS_KEPT: with whole sentences for captions there are about as many as images.
    """
    frequency: dict[str, Counter[str]] = {}
    for number, subset in enumerate(dataset.subsets):
        counts = frequency.setdefault(_source(subset), Counter())
        for record in members(table, index, number).tolist():
            line = table.caption(record).partition("\n")[0]
            counts.update(tag.strip().lower() for tag in line.split(",") if tag.strip())
    return {folder: dict(counts.most_common(TAGS_KEPT)) for folder, counts in frequency.items()}


def _folder_counts(table: RecordTable, datasets: Sequence[DatasetConfig], is_reg: bool) -> dict[str, dict[str, Any]]:
    counts = {}
    for report in table.reports:
        subset = datasets[report.dataset].subsets[report.subset]
        if subset.is_reg == is_reg:
            counts[_source(subset)] = {"n_repeats": whole(subset.num_repeats), "img_count": report.images}
    return counts


def _source(subset: SubsetConfig) -> str:
    """What the format names a subset by: its metadata file, or its folder."""
    return subset.metadata_file.name if subset.metadata_file is not None else subset.name


def _report(table: RecordTable, dataset: int, subset: int) -> SubsetReport:
    return next(report for report in table.reports if (report.dataset, report.subset) == (dataset, subset))


def members(table: RecordTable, dataset: int, subset: int) -> np.ndarray:
    """The records of a subset."""
    return np.flatnonzero((table.subsets[:, 0] == dataset) & (table.subsets[:, 1] == subset))


def uses_of_subset(table: RecordTable, dataset: int, subset: int) -> int:
    """Times that images of a subset are used per epoch, as the plan counts them."""
    return uses_per_epoch(table.repeats[members(table, dataset, subset)])


def whole(value: float) -> float | int:
    """A number without decimals as an int: readers show it as it is stored."""
    return int(value) if value == int(value) else value
