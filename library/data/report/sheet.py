"""The dataset sheet: a page and a JSON file that show what the model will see. Nothing is loaded but the images."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library.bars import progress_bar
from library.data import captions, images
from library.data.buckets import Buckets, Geometry
from library.data.config import DatasetConfig, SubsetConfig
from library.data.plan import Item, RunPlan
from library.data.records import Record, RecordTable, SubsetReport, geometry_of
from library.data.report import tables
from library.data.report.sheet_page import page
from library.data.report.sheet_problems import problems
from library.data.report.summary import summarise
from library.errors import UserError
from library.randomness import generator

CountTokens = Callable[[str], Mapping[str, tuple[int, str]]]
"""A caption -> by text encoder: how many tokens it has, and the end of it that the encoder does not get ("": none)."""

_LONGEST_SIDE = 640  # pixels of a picture on the page: enough to judge a crop by
_TINT = np.array((214, 40, 120), dtype=np.float32)
_PICTURE = re.compile(r"\d+-\d+(-mask)?\.webp")


@dataclass(frozen=True)
class _Use:
    """One use of an image in the run."""

    epoch: int
    step: int
    item: Item


@dataclass(frozen=True)
class _Sheet:
    """What the pictures and captions are made with."""

    folder: Path
    table: RecordTable
    datasets: Sequence[DatasetConfig]
    buckets: Sequence[Buckets]
    """By dataset."""
    count_tokens: CountTokens
    total_steps: int
    masked_loss: bool
    templates: Sequence[str]

    def subset(self, record: Record) -> SubsetConfig:
        return self.datasets[record.dataset].subsets[record.subset]

    def geometry(self, record: Record) -> Geometry:
        return geometry_of(record, self.buckets[record.dataset])


def write_sheet(
    folder: Path,
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    plan: RunPlan,
    count_tokens: CountTokens,
    *,
    total_steps: int,
    limit: int = 200,
    epochs: int = 3,
    masked_loss: bool = False,
    templates: Sequence[str] = (),
) -> Path:
    """Writes `index.html`, `dataset.json` and `pictures/` into `folder` and returns the path of the page.

    At most `limit` images are shown, an even choice from each bucket of each subset, each as it is used first in each
    of the first `epochs` epochs of the run, which has `total_steps` steps. `plan` should be that of a single process:
    one of several sees a part of the images only. Raises UserError if `folder` cannot be written.
    """
    buckets = [dataset.buckets() for dataset in datasets]
    sheet = _Sheet(folder, table, datasets, buckets, count_tokens, total_steps, masked_loss, templates)
    epochs = max(1, min(epochs, -(-total_steps // plan.steps_per_epoch)))
    chosen = choose(table, limit)
    summary = summarise(table, datasets, plan)
    try:
        _make_room(folder)
        uses = _first_uses(plan, {int(record) for record in chosen}, epochs)
        cards = _cards(sheet, chosen, uses)
        facts = {
            "seed": plan.seed,
            "epochs": epochs,
            "images": table.in_use,
            "shown": len(cards),
            "held_out": summary.held_out,
            "problems": problems(table, datasets, summary, cards, masked_loss=masked_loss),
            "tables": [_table_facts(title, rows) for title, rows in summary.sections()],
            "totals": summary.lines(),
            "subsets": [_subset_facts(sheet, report, cards) for report in table.reports],
        }
        # a file name that is no UTF-8 ends up as \udc.., which JSON reads as what it was
        text = json.dumps(facts, ensure_ascii=False, indent=1)
        (folder / "dataset.json").write_text(text, encoding="utf-8", errors="backslashreplace")
        (folder / "index.html").write_text(page(facts), encoding="utf-8", errors="backslashreplace")
    except OSError as problem:
        raise UserError(f"{folder}: the dataset sheet cannot be written ({problem.strerror})") from None
    return folder / "index.html"


def choose(table: RecordTable, limit: int) -> np.ndarray:
    """At most `limit` of the images in use, sorted: as many from each bucket of each subset as there is room for,
    evenly spaced. Of more buckets than that, one image each from an even choice of buckets.
    """
    groups = []
    for _, _, members in table.by_bucket():
        owners = table.subsets[members, 1]
        groups += [members[owners == subset] for subset in np.unique(owners)]
    if len(groups) > limit:
        groups = [groups[index] for index in _spaced(len(groups), limit)]
    shares = _shares(np.array([len(group) for group in groups]), limit)
    picked = [group[_spaced(len(group), share)] for group, share in zip(groups, shares, strict=True)]
    return np.sort(np.concatenate(picked))


def _spaced(count: int, wanted: int) -> np.ndarray:
    """`wanted` of the numbers below `count`, evenly spaced."""
    return (2 * np.arange(wanted) + 1) * count // (2 * wanted)


def _shares(sizes: np.ndarray, limit: int) -> np.ndarray:
    """How many from each group: all of the small ones, and the others share what is left."""
    shares = np.zeros_like(sizes)
    left = min(limit, int(sizes.sum()))
    for done, group in enumerate(np.argsort(sizes, kind="stable")):
        shares[group] = min(sizes[group], left // (len(sizes) - done))
        left -= int(shares[group])
    return shares


def _first_uses(plan: RunPlan, chosen: set[int], epochs: int) -> dict[int, dict[int, _Use]]:
    """By record and epoch: the first use of each chosen record in each of the first epochs."""
    uses: dict[int, dict[int, _Use]] = {record: {} for record in chosen}
    bar = progress_bar(
        total=epochs * plan.steps_per_epoch, desc="planning the sheet", unit="step", delay=1, leave=False
    )
    with bar:
        for batch in plan.iterate(0, epochs * plan.steps_per_epoch):
            bar.update(batch.last_micro)
            for item in batch.items:
                if item.record in chosen and not batch.filler:
                    uses[item.record].setdefault(batch.epoch, _Use(batch.epoch, batch.step, item))
    return uses


def _cards(sheet: _Sheet, chosen: np.ndarray, uses: Mapping[int, Mapping[int, _Use]]) -> list[dict[str, Any]]:
    """The facts of each chosen image; its pictures are written."""

    def card(number_and_record: tuple[int, int]) -> dict[str, Any]:
        number, record = number_and_record
        return _card(sheet, number, sheet.table[record], list(uses[record].values()))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        numbered = enumerate(chosen.tolist(), start=1)
        return list(progress_bar(pool.map(card, numbered), desc="making the sheet", unit="img", total=len(chosen)))


def _card(sheet: _Sheet, number: int, record: Record, uses: Sequence[_Use]) -> dict[str, Any]:
    geometry = sheet.geometry(record)
    drawings = [_drawing(sheet, record, use) for use in uses]
    pictures, problem = [], ""
    try:
        pictures = _pictures(sheet, number, record, uses)
    except images.BrokenImage as broken:
        only_latents = not os.path.exists(record.path) and os.path.exists(f"{os.path.splitext(record.path)[0]}.npz")
        problem = "the image is gone, its latents are used" if only_latents else f"cannot be used: {broken}"
    return {
        "file": os.path.basename(record.path),
        "dataset": record.dataset,
        "subset": record.subset,
        "size": [record.width, record.height],
        "resized": list(geometry.resized),
        "bucket": list(record.bucket),
        "aspect_error": round(geometry.aspect_error, 4),
        "upscaled": geometry.resized[0] * geometry.resized[1] > record.width * record.height,
        "repeats": round(record.repeats, 4),
        "mask": os.path.basename(record.mask),
        "caption": record.caption,
        "drawings": drawings,
        "pictures": pictures,
        "problem": problem,
    }


def _drawing(sheet: _Sheet, record: Record, use: _Use) -> dict[str, Any]:
    """A caption as training would draw it for this use."""
    subset = sheet.subset(record)
    caption = captions.compose(
        record.caption,
        subset.captions,
        rng=generator(use.item.seed, "caption"),
        epoch=use.epoch,
        step=use.step,
        total_steps=sheet.total_steps,
        templates=() if subset.is_reg else sheet.templates,
    )
    tokens = {name: {"count": count, "cut": cut} for name, (count, cut) in sheet.count_tokens(caption).items()}
    return {"epoch": use.epoch, "step": use.step, "caption": caption, "tokens": tokens}


def _pictures(sheet: _Sheet, number: int, record: Record, uses: Sequence[_Use]) -> list[dict[str, Any]]:
    """Writes the image as training sees it in each use, each different one once. Raises BrokenImage."""
    options = sheet.subset(record).images
    varies = options.flip_aug or options.color_aug or options.random_crop or options.face_crop_aug_range is not None
    mask = record.mask if sheet.masked_loss else ""
    pictures: dict[bytes, dict[str, Any]] = {}
    for use in (uses if varies else uses[:1]) or [None]:
        rng = None if use is None else generator(use.item.seed, "augment")
        example = images.example(record.path, sheet.geometry(record), options, rng, mask)
        digest = hashlib.sha256(np.ascontiguousarray(example.image)).digest()
        if digest not in pictures:
            pictures[digest] = _write_picture(sheet.folder, f"{number:04d}-{len(pictures) + 1}", example)
        pictures[digest]["epochs"] += [use.epoch] if varies and use else []
    return list(pictures.values())


def _write_picture(folder: Path, name: str, example: images.Example) -> dict[str, Any]:
    facts = {"epochs": [], "flipped": example.flipped, "image": _save(folder, name, example.image)}
    if example.mask is not None:
        facts["mask"] = _save(folder, f"{name}-mask", _tinted(example.image, example.mask))
        facts["mask_area"] = round(float(example.mask.mean()), 4)
    return facts


def _tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with a tint over what the mask leaves out. uint8 (h, w, 3)."""
    left_out = (1 - mask[..., None]) * 0.65
    return np.rint(image * (1 - left_out) + _TINT * left_out).astype(np.uint8)


def _save(folder: Path, name: str, image: np.ndarray) -> str:
    """Writes a picture and returns its path within the folder."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    small = max(picture.size) <= 256  # enlarged on the page, where compression would show
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    picture.save(folder / "pictures" / f"{name}.webp", quality=90, lossless=small)
    return f"pictures/{name}.webp"


def _make_room(folder: Path) -> None:
    """The folder, without an earlier sheet: its page would show the new pictures until it is replaced."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "dataset.json"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "pictures").iterdir():
        if _PICTURE.fullmatch(path.name):
            path.unlink()


def _subset_facts(sheet: _Sheet, report: SubsetReport, cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    subset = sheet.datasets[report.dataset].subsets[report.subset]
    own = [card for card in cards if (card["dataset"], card["subset"]) == (report.dataset, report.subset)]
    table = sheet.table
    inside = (table.subsets[:, 0] == report.dataset) & (table.subsets[:, 1] == report.subset) & (table.repeats > 0)
    buckets, counts = np.unique(table.buckets[inside], axis=0, return_counts=True)
    return {
        "dataset": report.dataset,
        "subset": report.subset,
        "name": subset.name,
        "path": str(subset.image_dir or subset.metadata_file),
        "regularisation": subset.is_reg,
        "images": report.images,
        "held_out": report.held_out,
        "unused": report.images - report.held_out - int(counts.sum()),
        "repeats": tables.number(float(subset.num_repeats)),
        "per_epoch": round(float(table.repeats[inside].sum(dtype=np.float64))),
        "class_tokens": subset.class_tokens,
        "options": _options(subset),
        "buckets": [
            {"bucket": bucket, "images": count, "cards": [card for card in own if card["bucket"] == bucket]}
            for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True)
        ],
    }


def _options(subset: SubsetConfig) -> dict[str, Any]:
    """The subset's options for captions and images that are not as they are by default."""
    groups = (subset.captions, subset.images)
    values = {f.name: (getattr(group, f.name), f.default) for group in groups for f in fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _table_facts(title: str, rows: Sequence[Any]) -> dict[str, Any]:
    grid = tables.grid(rows)
    return {"title": title, "headings": grid.headings, "rows": grid.cells, "left": grid.left}
