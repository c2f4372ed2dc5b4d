"""Pictures sorted into buckets and encoded ahead of fine-tuning, for metadata that says at which size each was."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from library.data.buckets import Size
from library.data.caching import latents_file
from library.data.caching.cache import Encode, write_latents
from library.data.caching.latents_file import Recipe, State
from library.data.caching.latents_plan import LatentsPlan, plan_latents
from library.data.config import DatasetConfig, SubsetConfig, check_resolutions, with_whole_steps
from library.data.images import ImageOptions
from library.data.records import scan
from library.data.report import tables
from library.data.scanning.wording import counted
from library.devices import fastest_device
from library.errors import UserError
from library.models.registry import ModelInfo, inspect_model
from library.options.prepare_latents import PrepareLatentsOptions
from library.options.work import WorkOptions
from library.preprocessing.journal import Journal
from library.preprocessing.metadata.file import MetadataFile
from library.preprocessing.metadata.keys import Keys
from library.preprocessing.metadata.resolutions import write_resolutions
from library.preprocessing.tally import Tally
from library.tool_files import check_writable
from library.training.caching import latents_layout, vae_encoder
from library.training.device.hardware import settle_precision
from library.training.device.precision import MIXED

_SHOWN = 20  # buckets in the table at the end


@dataclass(frozen=True)
class _Folders(DatasetConfig):
    """The folders of the pictures as a dataset, whose resolution has another flag than in training."""

    def where(self, name: str) -> str:
        return "--max_resolution" if name == "resolution" else super().where(name)


@dataclass(frozen=True)
class _BucketRow:
    """A line of the table at the end."""

    bucket: str
    images: int


def prepare(
    pictures: Sequence[Path],
    keys: Keys,
    known: MetadataFile,
    model: Path,
    vae: Path | None,
    options: PrepareLatentsOptions,
    work: WorkOptions,
) -> None:
    """Write the latents of the pictures that have none that fit, then the metadata `known`, and print what came of it.

    The model is read only if latents are missing. UserError for what does not fit the model, a folder or disk that
    takes no files, latents that are not finite, and if no picture can be used.
    """
    info = inspect_model(model, vae)
    if options.v2 and info.family.name != "sd2":
        raise UserError(f"--v2: {info.name} is {info.family.as_kind()}, drop it")
    datasets = (_dataset(pictures, options),)
    check_resolutions(datasets, info.latents.step)
    device = fastest_device()
    mixed = settle_precision(options.mixed_precision, device)
    dtype = torch.float32 if options.no_half_vae else MIXED[mixed]
    table = scan(datasets)
    layout = replace(latents_layout(info), suffix=".npz", by_stem=True)
    plan = plan_latents(
        table,
        datasets,
        layout,
        to_disk=True,
        skip_check=options.skip_existing,
        recache_unknown=not options.skip_existing,
        anew=work.force,
    )
    journal = _journal(options, plan, dtype) if work.force else None
    for folder in sorted({os.path.dirname(table[index].path) for index in _missing(plan)}):
        check_writable("train_data_dir", Path(folder, "latents"))
    tally = Tally(skipped=len(table) - plan.missing)
    tally.failed += [
        Path(datasets[0].subsets[report.subset].image_dir, name) for report in table.reports for name in report.broken
    ]

    def note(recipe: Recipe) -> None:
        tally.written += 1
        if journal:
            journal.note(recipe.record.path)

    with tally:
        encoder = _encoder(info, dtype, device)
        write_latents(plan, encoder, batch_size=options.batch_size, threads=work.threads, note=note)
        tally.failed += [Path(table[index].path) for index in _missing(plan)]
        if tally.written or tally.skipped:
            print(_report(plan))
            sizes: dict[Path, Size] = {Path(record.path): record.bucket for record in table}
            count, lacking = write_resolutions(known, options.out_json, keys, sizes)
            others = f"; {counted(lacking, 'other has', 'others have')} none yet" if lacking else ""
            entries = counted(count, "entry", "entries")
            print(f"{options.out_json}: written, {entries} with the train_resolution of a picture{others}")
        if journal:
            journal.finish()
        tally.tell("latents", str(device))


def _dataset(pictures: Sequence[Path], options: PrepareLatentsOptions) -> DatasetConfig:
    """The folders that the pictures lie in, as training would be given them."""
    images = ImageOptions(flip_aug=options.flip_aug, alpha_mask=bool(options.alpha_mask))
    folders = dict.fromkeys(picture.parent for picture in pictures)
    # class tokens stand in for captions, so that nobody is warned of those that are in the metadata
    subsets = [SubsetConfig(folder, class_tokens="-", caption_extension="", images=images) for folder in folders]
    dataset = _Folders(
        resolution=options.resolution,
        batch_size=options.batch_size,
        enable_bucket=True,
        min_bucket_reso=options.min_bucket_reso,
        max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps,
        bucket_no_upscale=options.bucket_no_upscale,
        subsets=tuple(subsets),
    )
    return dataset if options.bucket_no_upscale else with_whole_steps(dataset)


def _encoder(info: ModelInfo, dtype: torch.dtype, device: torch.device) -> Encode:
    """Encodes with the model's autoencoder, which is read when it is first needed."""

    @cache
    def loaded() -> Encode:
        return vae_encoder(info.load_vae(dtype, device), "--batch_size")

    return lambda pixels, seeds: loaded()(pixels, seeds)


def _journal(options: PrepareLatentsOptions, plan: LatentsPlan, dtype: torch.dtype) -> Journal:
    """What a run that makes all latents again is done with; what an unfinished one has made counts in the plan."""
    dataset, images = plan.datasets[0], plan.datasets[0].subsets[0].images
    purpose = {
        "vae": plan.layout.fingerprint,
        "resolution": dataset.resolution,
        "sizes": [dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps],
        "bucket_no_upscale": dataset.bucket_no_upscale,
        "flip_aug": images.flip_aug,
        "alpha_mask": images.alpha_mask,
        "batch_size": dataset.batch_size,
        "dtype": str(dtype),
    }
    journal = Journal(options.out_json.with_name(f"{options.out_json.name}.unfinished"), purpose)
    for index in _missing(plan):
        recipe = plan.recipe(index)
        if recipe.record.path in journal.done and latents_file.judge(recipe).state == State.VALID:
            plan.states[index] = State.VALID
    return journal


def _missing(plan: LatentsPlan) -> list[int]:
    return np.flatnonzero(plan.states == State.MISSING).tolist()


def _report(plan: LatentsPlan) -> str:
    """How many pictures with latents each bucket has, of many buckets the largest, and how well they fit."""
    there = np.flatnonzero(plan.states >= State.VALID)
    rows = [_BucketRow(f"{w}x{h}", len(members)) for _, (w, h), members in plan.table.by_bucket(there)]
    shown = sorted(sorted(rows, key=lambda row: -row.images)[:_SHOWN], key=rows.index)
    lines = [tables.text(shown)]
    if len(rows) > len(shown):
        others = sum(row.images for row in rows) - sum(row.images for row in shown)
        lines.append(f"and {others} images in {len(rows) - len(shown)} more buckets")
    error = _aspects(plan.table.buckets[there]) - _aspects(plan.table.sizes[there])
    return "\n".join([*lines, f"mean aspect error: {tables.number(float(np.abs(error).mean()))}"])


def _aspects(sizes: np.ndarray) -> np.ndarray:
    """(N,) width by height of (N, 2)."""
    return sizes[:, 0] / sizes[:, 1]
