"""Weighted sums of checkpoints in the original layout, made tensor by tensor while they are written."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from library import console
from library.bars import Lines, progress_bar
from library.errors import UserError, some
from library.models.files.checkpoint import (
    Hashes,
    LazyTensors,
    WeightsFile,
    hash_file,
    is_finite,
    open_weights,
    stores_metadata,
    write_tensors,
)
from library.models.metadata import IMPLEMENTATION_VERSION
from library.models.noise import Prediction
from library.models.prediction import prediction_of
from library.models.sgm_keys import UNET_PREFIX, Shapes, is_carried, is_dropped, usual_keys

# The start of a text encoder's names -> the families that have it, as in a sentence.
_FAMILIES = {
    "conditioner.embedders.": "an SDXL model",
    "cond_stage_model.model.": "a Stable Diffusion 2.x model",
    "cond_stage_model.transformer.": "a Stable Diffusion 1.x model",
}
_CONTEXT = ".attn2.to_k.weight"  # its width is that of the text, which tells U-Nets of SD 1.x and 2.x apart
INHERITED = tuple(f"modelspec.{name}" for name in ("architecture", "prediction_type", "resolution"))


@dataclass(frozen=True)
class Recipe:
    """How models are summed: one weight per model, in `dtype` on `device`; only the U-Net with `unet_only`.

    Floating-point tensors come out as `stored`, each as in the first model if that is None.
    """

    ratios: Sequence[float]
    unet_only: bool = False
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    device: torch.device | str = "cpu"


class MergedTensors(LazyTensors):
    """The tensors of a merge under the first file's names, each computed when it is asked for, on the CPU. Never
    more than one tensor of each file is in memory.

    Whatever is no floating-point weight comes from the first file: position ids, tables of the noise schedule, and
    tensors without a counterpart of the same shape in every file, which are listed in `skipped`. Averaged copies
    from training (`model_ema.`) are left out: they would not be those of the merged weights.

    Raises:
        UserError: a file without a U-Net or with two names for one tensor, or files of different families.
    """

    def __init__(self, files: Sequence[WeightsFile], recipe: Recipe):
        self._files, self._recipe = files, recipe
        names = [usual_keys(file) for file in files]
        shapes = [{name: file.shape(key) for name, key in of.items()} for file, of in zip(files, names, strict=True)]
        _check_same_family(files, shapes)
        self.skipped: list[str] = []
        self._sources: dict[str, list[str] | None] = {}  # by name in the first file: names in all, None if not summed
        for name, key in names[0].items():
            if is_dropped(name):
                continue
            summed = _is_weight(name) and (name.startswith(UNET_PREFIX) or not recipe.unet_only)
            fits = all(other.get(name) == shapes[0][name] for other in shapes[1:])
            self._sources[key] = [key, *(of[name] for of in names[1:])] if summed and fits else None
            if summed and not fits:
                self.skipped.append(key)
        self.left_out = len(files[0].keys()) - len(self._sources)

    @property
    def summed(self) -> int:
        """How many tensors are summed."""
        return sum(sources is not None for sources in self._sources.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, key: str) -> Tensor:
        sources, recipe = self._sources[key], self._recipe
        total = read_tensor(self._files[0], key)
        if not total.is_floating_point():
            return total
        stored = recipe.stored or total.dtype
        if sources is None:
            return total.to(stored)
        total = total.to(recipe.device, recipe.dtype).mul_(recipe.ratios[0])
        for file, name, ratio in zip(self._files[1:], sources[1:], recipe.ratios[1:], strict=True):
            total.add_(read_tensor(file, name).to(recipe.device, recipe.dtype), alpha=ratio)
        return total.to("cpu", stored)

    def outlines(self) -> Mapping[str, Tensor]:
        return {key: self._outline(key) for key in self}

    def _outline(self, key: str) -> Tensor:
        first = self._files[0]
        outline = torch.empty(first.shape(key), dtype=first.dtype(key), device="meta")
        return outline.to(self._recipe.stored) if self._recipe.stored and outline.is_floating_point() else outline


def read_tensor(file: WeightsFile, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """As `WeightsFile.get`. UserError also if the disk does not give it."""
    try:
        return file.get(key, dtype)
    except OSError as error:  # said here, since in the middle of writing it would look like a mistake of the output's
        raise UserError(f"{file.path} cannot be read: {error.strerror}") from error


def verify(file: WeightsFile) -> None:
    """As `WeightsFile.verify`. UserError also if the disk does not give it."""
    try:
        file.verify()
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror}") from error


def _is_weight(name: str) -> bool:
    """Whether a tensor of this (usual) name is learned, so that a mean of several means something."""
    return not is_carried(name) and not name.endswith("position_ids")


def _check_same_family(files: Sequence[WeightsFile], shapes: Sequence[Shapes]) -> None:
    for file, own in zip(files, shapes, strict=True):
        if not any(name.startswith(UNET_PREFIX) for name in own):
            raise UserError(
                f"{file.path} has no U-Net under the names of the original layout ({UNET_PREFIX}...), its tensors are "
                f"named {some(sorted(own))}: give complete checkpoints"
            )
    first, unet = files[0], {name: shape for name, shape in shapes[0].items() if name.startswith(UNET_PREFIX)}
    for file, own in zip(files[1:], shapes[1:], strict=True):
        family, other = _family(shapes[0]), _family(own)
        if family and other and family != other:
            raise UserError(
                f"{file.path} is {other} and {first.path} is {family}: only models of one family can be merged"
            )
        fitting = [name for name, shape in unet.items() if own.get(name) == shape]
        foreign_text = any(name.endswith(_CONTEXT) and own.get(name, shape) != shape for name, shape in unet.items())
        if foreign_text or len(fitting) * 2 < len(unet):
            raise UserError(
                f"{file.path} is built differently from {first.path}, {len(fitting)} of {len(unet)} tensors of the "
                "U-Net have the same name and shape: only models of one family can be merged"
            )


def _family(shapes: Shapes) -> str | None:
    """The family as in a sentence, None where there is no text encoder to tell it by."""
    return next((title for start, title in _FAMILIES.items() if any(name.startswith(start) for name in shapes)), None)


def merge_models(models: Sequence[Path], output: Path, recipe: Recipe, show_skipped: bool = False) -> None:
    """Write the weighted sum of checkpoints to `output`, which is replaced only when the new file is whole. A
    .safetensors gets the hash of its contents, a .ckpt is wrapped as whole models are.

    UserError as from `open_weights`, `WeightsFile.verify`, `MergedTensors` and `write_tensors`.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in models]
        merged = MergedTensors(files, recipe)
        for file in files:
            verify(file)
        _tell(files, merged, recipe, show_skipped)
        metadata = merged_metadata(files, recipe, output.stem) if stores_metadata(output) else None
        with progress_bar(total=len(merged), desc="merging", unit="tensor", delay=1, leave=False) as bar:
            watched = Watched(merged, bar)
            write_tensors(output, watched, None, metadata, content_hash=True, beside={})
    warn_not_finite(output, watched.not_finite)


class Watched(LazyTensors):
    """The same tensors; shows progress and notes those that are not finite."""

    def __init__(self, tensors: LazyTensors, bar: tqdm | Lines):
        self._tensors, self._bar = tensors, bar
        self.not_finite: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        self._bar.update()
        if not is_finite(tensor):
            self.not_finite.add(key)
        return tensor

    def outlines(self) -> Mapping[str, Tensor]:
        return self._tensors.outlines()


def warn_not_finite(output: Path, names: Collection[str]) -> None:
    """Tell of the tensors in what has been written that are not finite, if there are any."""
    if names:
        console.warn(
            f"{output}: {len(names)} tensors hold values that are not finite, or too large for the number format they "
            f"are saved in: {some(sorted(names))}"
        )


def _tell(files: Sequence[WeightsFile], merged: MergedTensors, recipe: Recipe, show_skipped: bool) -> None:
    total = sum(recipe.ratios)
    if abs(total - 1) > 1e-6:
        console.notice(f"the ratios sum to {total:g}, not to 1, and are used as they are")
    predictions = {prediction for file in files if (prediction := prediction_of(file))}
    if len(predictions) > 1:
        told = ", ".join(sorted(map(_told, predictions)))
        console.warn(f"the models predict different things ({told}): their sum may not work")
    console.notice(f"{merged.summed} tensors are merged, {len(merged) - merged.summed} come from the first model")
    if merged.left_out:
        console.notice(f"{merged.left_out} tensors of training (averaged weights, losses) are left out")
    if merged.skipped:
        hint = "" if show_skipped else "; --show_skipped lists them"
        console.warn(
            f"{len(merged.skipped)} tensors are missing in another model or have another shape there, "
            f"and are kept from the first one{hint}"
        )
        if show_skipped:
            print(*merged.skipped, sep="\n")


def _told(prediction: Prediction) -> str:
    return prediction.kind + (" with zero terminal SNR" if prediction.zero_terminal_snr else "")


def merged_metadata(files: Sequence[WeightsFile], recipe: Recipe, title: str) -> dict[str, str]:
    """The metadata of a merge, for which the files are read; see `provenance`."""
    sources = [Source.of(file.path) for file in files]
    return provenance(title, files[0].metadata, sources, _recipe_text(recipe, sources))


class Source(NamedTuple):
    """What something was made from: the names that others may learn, and the hashes, of a file."""

    file_name: str
    stem: str
    hashes: Hashes | None

    @classmethod
    def of(cls, path: Path) -> "Source":
        return cls(path.name, path.stem, hash_file(path))


def provenance(
    title: str, first: Mapping[str, str], sources: Sequence[Source], recipe: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a model that was made from others: `modelspec.*`, and `sd_merge_*` with the hashes of the files.

    What the `first` model's metadata say of its architecture, prediction and resolution is taken over. No paths, only
    names.
    """
    hashed = [(source.file_name, source.hashes) for source in sources if source.hashes]
    fields = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.implementation_version": IMPLEMENTATION_VERSION,
        "modelspec.merged_from": ", ".join(source.stem for source in sources),
        "sd_merge_recipe": json.dumps(recipe),
        "sd_merge_models": json.dumps({own.sha256: {"name": name, "legacy_hash": own.legacy} for name, own in hashed}),
    }
    return fields | {name: first[name] for name in INHERITED if name in first}


def _recipe_text(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    return {
        "type": "atelier",
        "models": [source.hashes.sha256 for source in sources],
        "ratios": list(recipe.ratios),
        "unet_only": recipe.unet_only,
        "precision": str(recipe.dtype).removeprefix("torch."),
    }
