"""What on a dataset sheet is wrong, or probably not meant."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.data.config import DatasetConfig, SubsetConfig
from library.data.records import RecordTable, SubsetReport
from library.data.report.summary import MaskRow, SmallBucket, Summary

_FILES_NAMED = 20

Card = Mapping[str, Any]


def problems(
    table: RecordTable,
    datasets: Sequence[DatasetConfig],
    summary: Summary,
    cards: Sequence[Card],
    *,
    masked_loss: bool,
) -> list[dict[str, Any]]:
    """One entry for each, {"where": folder, bucket or file, "what": a sentence without it, "files": some names}."""
    found = []
    for report in table.reports:
        subset = datasets[report.dataset].subsets[report.subset]
        found += [_entry(subset.name, *problem) for problem in _of_subset(report, subset, masked_loss)]
    found += [_entry(row.masks, what) for row in summary.masks for what in _of_masks(row)]
    found += [_entry(*_of_bucket(row)) for row in summary.small_buckets]
    return found + [_entry(*problem) for problem in _of_cards(cards)]


def _entry(where: str, what: str, files: Sequence[str] = ()) -> dict[str, Any]:
    return {"where": where, "what": what, "files": list(files[:_FILES_NAMED])}


def _of_subset(report: SubsetReport, subset: SubsetConfig, masked_loss: bool) -> Iterator[tuple]:
    if report.broken:
        yield f"{_count(report.broken, 'image')} cannot be read and left out", report.broken
    if report.captions_missing and not subset.is_reg:  # those have none as a rule
        instead = f"“{subset.class_tokens}”" if subset.class_tokens else "an empty one"
        yield (f"{_count(report.captions_missing, 'image')} without a caption, trained with {instead}",)
    if report.captions_without_image:
        yield (f"{_count(report.captions_without_image, 'caption')} without an image",)
    if report.skipped_small:
        yield (f"{_count(report.skipped_small, 'image')} left out because of skip_image_resolution",)
    if report.animated:
        yield (f"{_count(report.animated, 'animation')}, of which only the first frame is used",)
    if report.masks_missing:
        yield (f"{_count(report.masks_missing, 'image')} without a mask, trained on as a whole",)
    if report.stray_masks:
        yield (f"{_count(report.stray_masks, 'mask')} without an image",)
    if report.masks_wrong_size:
        whose = "its image" if report.masks_wrong_size == 1 else "their images"
        what = f"{_count(report.masks_wrong_size, 'mask')} of other proportions than {whose}, and distorted"
        yield what, report.wrong_masks
    if report.masks_found and not masked_loss:
        yield (f"{_count(report.masks_found, 'mask')} not used: add --masked_loss",)


def _of_masks(row: MaskRow) -> Iterator[str]:
    looked_at = f"of {_count(row.looked_at, 'mask')} looked at"
    if row.all_zero:
        yield f"{row.all_zero} {looked_at} all zero, so that nothing is learned from the image"
    if row.unreadable:
        yield f"{row.unreadable} {looked_at} unreadable"


def _of_bucket(row: SmallBucket) -> tuple[str, str, Sequence[str]]:
    what = f"{_count(row.per_epoch, 'use')} per epoch, less than half a batch of {row.batch_size}"
    return f"bucket {row.bucket}", what, row.files


def _of_cards(cards: Sequence[Card]) -> Iterator[tuple]:
    for card in cards:
        if card["problem"]:
            yield card["file"], card["problem"]
    cut = [card["file"] for card in cards if any(t["cut"] for d in card["drawings"] for t in d["tokens"].values())]
    if cut:
        yield "captions", f"{len(cut)} of {_count(cards, 'image')} shown with a caption that is cut off", cut


def _count(things: int | Sequence, noun: str) -> str:
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
