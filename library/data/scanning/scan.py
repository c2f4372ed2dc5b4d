"""The images of all subsets -> the columns of a RecordTable."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from library.console import warn
from library.data.buckets import Buckets, Geometry, Size, cover
from library.data.config import DatasetConfig, SubsetConfig
from library.data.scanning.columns import Texts, TextWriter
from library.data.scanning.listing import normalised
from library.data.scanning.masks import find_masks
from library.data.scanning.sources import Found, in_folder, in_metadata
from library.data.scanning.wording import counted
from library.errors import UserError, some
from library.randomness import address

COLUMNS = ("sizes", "buckets", "subsets", "repeats", "validation", "shared_stems", "full_stems")
TEXTS = ("names", "captions", "masks")


@dataclass(frozen=True, slots=True)
class SubsetReport:
    """What a scan found in one subset."""

    dataset: int
    subset: int
    images: int
    captions_missing: int
    captions_without_image: int
    broken: tuple[str, ...]
    """Names of the files that should be images and cannot be read."""
    skipped_small: int
    """Images left out because of skip_image_resolution."""
    animated: int
    """Animations, of which the first frame is used."""
    masks_found: int
    masks_missing: int
    """Images without a mask, where there is a folder of masks."""
    stray_masks: int
    """Masks without an image."""
    masks_wrong_size: int
    """Masks of other proportions than their images."""
    wrong_masks: tuple[str, ...]
    """Names of the first of them."""
    held_out: int
    """Images for validation."""
    upscaled: int
    """Images that are enlarged."""
    aspect_error: float
    """Mean of |bucket aspect - image aspect|"""


class Builder:
    """Collects the columns while subsets are scanned, and writes them to a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self.texts = {name: TextWriter(folder, name) for name in TEXTS}
        self.roots: list[list[str]] = []
        self.mask_roots: list[list[str]] = []
        self.predefined: list[bool] = []
        self.reports: list[SubsetReport] = []
        self.training_images = 0
        self.empty_captions = 0
        self.first_empty = ""

    def add(self, index: int, dataset: DatasetConfig) -> None:
        """Scans the subsets of one dataset."""
        found = [in_metadata(subset) if subset.metadata_file else in_folder(subset) for subset in dataset.subsets]
        predefined = any(len(f.names) for f in found) and all(
            f.resolutions is not None and not f.without_resolution for f in found
        )
        if dataset.resolution is None and not predefined:
            _refuse_without_resolution(dataset, found)
        buckets = None if predefined else dataset.buckets()
        self.predefined.append(predefined)
        self.roots.append([f.root for f in found])
        self.mask_roots.append([str(subset.conditioning_data_dir or "") for subset in dataset.subsets])
        repeats = []
        for number in range(len(found)):
            repeats.append(self._add_subset(index, number, dataset, found[number], buckets))
            found[number] = None  # its texts are on the disk
        self.columns["repeats"] += _with_balanced_regularisation(repeats, dataset.subsets)

    def _add_subset(
        self, index: int, number: int, dataset: DatasetConfig, found: Found, buckets: Buckets | None
    ) -> np.ndarray:
        """Adds all columns but the repeats, which it returns: (N,) float64."""
        subset = dataset.subsets[number]
        kept, skipped = _large_enough(dataset, found)
        names = [found.names[row] for row in kept.tolist()]
        facts = found.facts.take(kept)
        count = len(names)
        buckets_of, upscaled, error = _choose(facts.sizes, kept, found, buckets)
        held_out = _held_out(found.names, subset)[kept]
        masks = find_masks(names, facts.sizes, subset)
        captions = facts.captions.filled(subset.class_tokens)
        self._note_empty(found.root, names, captions)
        _warn_of_animations(subset, names, facts.animated)
        self.columns["sizes"].append(facts.sizes)
        self.columns["buckets"].append(buckets_of)
        self.columns["subsets"].append(np.full((count, 2), (index, number), dtype=np.int32))
        self.columns["validation"].append(held_out)
        self.columns["shared_stems"].append(found.shared_stem[kept])
        self.columns["full_stems"].append(found.full_stem[kept])
        self.texts["names"].extend(Texts.of_names(names))
        self.texts["captions"].extend(captions)
        self.texts["masks"].extend(masks.names)
        used = count - int(held_out.sum())
        if count and not used:
            what = counted(count, "image that is left is", "images that are left are")
            warn(f"{subset.name}: the {what} held out for validation, so that there is nothing to train on")
        self.training_images += 0 if subset.is_reg else used
        self.reports.append(
            SubsetReport(
                dataset=index,
                subset=number,
                images=count,
                captions_missing=int((facts.captions.lengths < 0).sum()),
                captions_without_image=found.captions_without_image,
                broken=tuple(found.broken),
                skipped_small=skipped,
                animated=int(facts.animated.sum()),
                masks_found=masks.found,
                masks_missing=masks.missing,
                stray_masks=masks.stray,
                masks_wrong_size=masks.wrong_size,
                wrong_masks=masks.wrong_names,
                held_out=count - used,
                upscaled=upscaled,
                aspect_error=error,
            )
        )
        return np.where(held_out, 0.0, _uses(subset, used))

    def _note_empty(self, root: str, names: list[str], captions: Texts) -> None:
        empty = np.flatnonzero(captions.lengths == 0)
        self.empty_captions += len(empty)
        if len(empty) and not self.first_empty:
            self.first_empty = str(Path(root, names[empty[0]]))

    def warn_of_empty_captions(self) -> None:
        if self.empty_captions:
            count = "1 image has" if self.empty_captions == 1 else f"{self.empty_captions} images have"
            warn(
                f"{count} neither a caption nor class tokens, or an empty caption file, and will be trained with an "
                f"empty caption; the first is {self.first_empty}"
            )

    def write(self) -> None:
        for name, parts in self.columns.items():
            np.save(self.folder / f"{name}.npy", np.concatenate(parts))
        for writer in self.texts.values():
            writer.close()
        facts = {
            "roots": self.roots,
            "mask_roots": self.mask_roots,
            "predefined": self.predefined,
            "reports": [asdict(report) for report in self.reports],
        }
        (self.folder / "facts.json").write_text(json.dumps(facts))


def balanced_repeats(cycle: np.ndarray, uses: int) -> np.ndarray:
    """Uses per epoch (N,) of regularisation images with repeats `cycle` (N,), `uses` in all.

    They are gone through in order, each `cycle` times in a row, and again from the start, until there are enough: a
    long list is cut, a short one repeated.
    """
    if not len(cycle):
        return cycle
    rounds, rest = divmod(uses, int(cycle.sum()))
    used_before = np.cumsum(cycle) - cycle
    return rounds * cycle + np.clip(rest - used_before, 0, cycle)


def uses_per_epoch(repeats: np.ndarray) -> int:
    """How many samples the images of a subset with these repeats are: a whole number, and at least one."""
    total = math.fsum(repeats)  # ten times 0.15 is 1.5, and not a little less
    return max(round(total), 1) if total else 0


def _with_balanced_regularisation(repeats: list[np.ndarray], subsets: Sequence[SubsetConfig]) -> list[np.ndarray]:
    """The repeats per subset, where all regularisation images together are used as often as the others together."""
    uses = sum(uses_per_epoch(r) for r, subset in zip(repeats, subsets, strict=True) if not subset.is_reg)
    regular = [r for r, subset in zip(repeats, subsets, strict=True) if subset.is_reg]
    balanced = balanced_repeats(np.concatenate([np.empty(0), *regular]).astype(np.int64), uses).astype(np.float64)
    pieces = iter(np.split(balanced, np.cumsum([len(r) for r in regular])[:-1]) if regular else [])
    return [next(pieces) if subset.is_reg else r for r, subset in zip(repeats, subsets, strict=True)]


def _uses(subset: SubsetConfig, images: int) -> float:
    """How often an image of the subset is used per epoch."""
    if subset.images_per_epoch is None or not images:
        return float(subset.num_repeats)
    return subset.images_per_epoch / images


def _held_out(names: list[str], subset: SubsetConfig) -> np.ndarray:
    """(N,) whether each image is kept for validation: at least one, and never all of several.

    `names` are all images that were found, and the choice depends on them and the seed alone, so that a folder that is
    used at two resolutions loses the same images even where skip_image_resolution leaves out different ones.
    """
    held_out = np.zeros(len(names), dtype=bool)
    if subset.validation_split > 0 and not subset.is_reg and len(names) > 1:
        count = math.floor(len(names) * subset.validation_split + 0.5)
        seed = subset.validation_seed or 0
        ranks = np.array([address(seed, "validation", printable(name)) for name in names])
        held_out[np.argsort(ranks, kind="stable")[: min(max(count, 1), len(names) - 1)]] = True
    return held_out


def printable(name: str) -> str:
    """A file name as it takes part in addresses: the same on every system."""
    return normalised(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _large_enough(dataset: DatasetConfig, found: Found) -> tuple[np.ndarray, int]:
    """The rows of images that skip_image_resolution leaves, and how many it does not."""
    limit = dataset.skip_image_resolution
    areas = found.facts.sizes.astype(np.int64).prod(axis=1)
    kept = np.flatnonzero(areas > (limit[0] * limit[1] if limit else 0))
    skipped = len(areas) - len(kept)
    if skipped:
        are = "is" if skipped == 1 else "are"
        first = found.names[int(np.flatnonzero(areas <= limit[0] * limit[1])[0])]
        warn(
            f"{found.root}: {skipped} of {len(areas)} images {are} not larger than skip_image_resolution "
            f"{limit[0]}x{limit[1]} and {are} left out; the first is {first}"
        )
    return kept, skipped


def _choose(
    sizes: np.ndarray, kept: np.ndarray, found: Found, buckets: Buckets | None
) -> tuple[np.ndarray, int, float]:
    """(buckets (N, 2), how many images are enlarged, mean aspect error); each kind of image is looked at once."""
    wanted = np.zeros_like(sizes)
    if found.resolutions is not None:
        given = np.ones(len(kept), dtype=bool) if buckets is None else found.only_latents[kept]
        wanted[given] = found.resolutions[kept][given]
    kinds, rows, counts = _unique_rows(np.concatenate([sizes, wanted], axis=1))
    geometries = [_geometry((w, h), (bw, bh), buckets) for w, h, bw, bh in kinds.tolist()]
    chosen = np.array([geometry.bucket for geometry in geometries], dtype=np.int32).reshape(-1, 2)
    larger = np.array(
        [g.resized[0] * g.resized[1] > w * h for g, (w, h, *_) in zip(geometries, kinds.tolist(), strict=True)]
    )
    errors = np.array([geometry.aspect_error for geometry in geometries])
    upscaled = int(counts[larger.astype(bool)].sum())
    return chosen[rows], upscaled, float(np.average(errors, weights=counts)) if len(rows) else 0.0


def _geometry(size: Size, wanted: Size, buckets: Buckets | None) -> Geometry:
    return cover(size, wanted) if wanted[0] else buckets.choose(size)


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(different rows, which of them each row is, how often each occurs) of (N, 4) numbers below 2**31."""
    codes = (rows[:, 0].astype(np.uint64) << np.uint64(32)) | rows[:, 1].astype(np.uint64)
    more = (rows[:, 2].astype(np.uint64) << np.uint64(32)) | rows[:, 3].astype(np.uint64)
    if more.any():
        codes = np.unique(codes, return_inverse=True)[1].astype(np.uint64) << np.uint64(32)
        codes |= np.unique(more, return_inverse=True)[1].astype(np.uint64)
    _, first, inverse, counts = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    return rows[first], inverse, counts


def _warn_of_animations(subset: SubsetConfig, names: list[str], animated: np.ndarray) -> None:
    if animated.any():
        named = some([names[row] for row in np.flatnonzero(animated).tolist()])
        count = counted(int(animated.sum()), "image is an animation", "images are animations")
        warn(f"{subset.name}: {count}, of which the first frame is used: {named}")


def _refuse_without_resolution(dataset: DatasetConfig, found: list[Found]) -> None:
    """Says which subset makes a resolution necessary."""
    for subset, images in zip(dataset.subsets, found, strict=True):
        if images.without_resolution:
            raise UserError(
                f"{subset.metadata_file}: {images.without_resolution}: has no train_resolution, and no resolution is "
                "given: add --resolution, as --resolution=512, or have finetune/prepare_buckets_latents.py prepare its "
                "folder, too"
            )
    where = f"{dataset.where('resolution')} is missing" if dataset.place else "the training resolution is missing"
    raise UserError(f"{where}: give --resolution, as --resolution=512")
