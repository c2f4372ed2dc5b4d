"""LoRAs made of the difference of two models, which are never in memory as a whole."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library import console
from library.bars import progress_bar
from library.errors import UserError, some
from library.lora.changes import Factors
from library.lora.decomposition import largest_svd, squared_error, squared_norm
from library.lora.metadata import convolution_arguments, made_by, network_metadata, source
from library.lora.names import TEXT, part_title
from library.lora.targets import Target, find_layers
from library.lora.threads import in_order
from library.lora.writing import lora_tensors, write_network
from library.models.family import Family
from library.models.files.checkpoint import WeightsFile, stores_metadata
from library.models.merging import read_tensor, verify
from library.models.noise import Prediction
from library.models.registry import ModelInfo, inspect_model
from library.models.sgm_keys import is_carried, usual_keys
from networks.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, UNET_TARGETS_OF_CONVOLUTIONS
from networks.lora import find_layers as find_adapted_layers

_SMALLEST = 2.0**-24  # what numbers are apart near zero in fp16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a LoRA is extracted.

    `rank`: of linear layers and 1x1 convolutions; `conv_rank`: of 3x3 convolutions, which are left out without one.
    `clamp_quantile`: of the absolute values of both factors of a layer, beyond which they are clamped; 1 clamps none.
    `least_difference`: a text encoder none of whose weights differs by more is left out. `loaded`: what weights are
    rounded to before differences are taken. `family`: what the models are said to be, `v_prediction`: to predict.
    """

    rank: int
    conv_rank: int | None = None
    clamp_quantile: float = 0.99
    least_difference: float = 0.01
    exact: bool = False
    loaded: torch.dtype | None = None
    stored: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    family: str | None = None
    v_prediction: bool = False
    no_metadata: bool = False


class Difference(NamedTuple):
    """Of a layer: `weight` (out, in x kernel), float32, and whether it is more than the rounding of what is stored."""

    name: str
    weight: Tensor
    real: bool


class Extracted(NamedTuple):
    """A layer of the LoRA. Squared norms: of the difference, and what of it is not in the factors before and after
    they are clamped.
    """

    name: str
    factors: Factors
    norm: float
    lost: float
    lost_clamped: float
    real: bool


@dataclass(frozen=True)
class Kept:
    """How much of the difference of a part of the model is in the LoRA, as shares of its squared norm."""

    part: str
    layers: int
    unclamped: float
    clamped: float

    def __str__(self) -> str:
        clamped = "" if self.clamped == self.unclamped else f", {self.clamped:.2%} after clamping"
        return f"{self.part}: {self.layers} layers, {self.unclamped:.2%} of the difference kept{clamped}"


class Differences:
    """What is different between two open models of one structure, by the names of layers in networks' files."""

    def __init__(self, files: Sequence[WeightsFile], targets: Mapping[str, Target], loaded: torch.dtype | None):
        self.targets = targets
        self._files, self._loaded = files, loaded
        self._keys = [usual_keys(file) for file in files]

    def between(self, name: str) -> Difference:
        """Of one layer. UserError if it cannot be read, or is not finite."""
        target = self.targets[name]
        original, tuned = (self._rows(index, target) for index in range(2))
        weight = tuned.sub_(original)
        least, most = torch.aminmax(weight)  # several times faster than amax(abs), which needs memory
        if not torch.isfinite(largest := torch.maximum(most, -least)):
            index = 0 if not original.isfinite().all() else 1
            raise UserError(
                f"{self._files[index].path} holds numbers that are not finite, in {self._keys[index][target.key]}: "
                "nothing can be extracted from it"
            )
        return Difference(name, weight, bool(largest) and self._is_real(target.key, weight, original))

    def _rows(self, index: int, target: Target) -> Tensor:
        file, key = self._files[index], self._keys[index][target.key]
        tensor = read_tensor(file, key, self._loaded or torch.float32).float().flatten(1)
        tensor = tensor[target.start :][: target.shape[0]]
        return tensor.T if target.turned else tensor

    def besides(self, start: str) -> list[str]:
        """The names of the tensors that begin like this, are not the same, and are in no layer of a LoRA."""
        of_layers = {target.key for target in self.targets.values()}
        first, second = self._keys
        names = [name for name in first if name.startswith(start) and not is_carried(name) and name in second]
        return [name for name in names if name not in of_layers and self._differ(name)]

    def _differ(self, name: str) -> bool:
        one, other = (
            read_tensor(file, keys[name], self._loaded or torch.float32)
            for file, keys in zip(self._files, self._keys, strict=True)
        )
        if one.shape != other.shape or torch.equal(one, other):
            return one.shape != other.shape
        return self._is_real(name, (other - one).float(), one.float())

    def _is_real(self, name: str, weight: Tensor, original: Tensor) -> bool:
        """Whether any number differs by more than two number formats make it."""
        formats = {file.dtype(keys[name]) for file, keys in zip(self._files, self._keys, strict=True)}
        if len(formats) == 1:
            return True
        coarsest = max(torch.finfo(dtype).eps for dtype in formats)
        return bool((weight.abs() > original.abs() * coarsest + _SMALLEST).any())


def extract_network(original: Path, tuned: Path, output: Path, recipe: Recipe) -> list[Kept]:
    """Write the LoRA that makes of the model `original` nearly the model `tuned`; returns what it keeps of each part,
    and of everything where there are several.

    UserError if the models do not fit together or to what they are said to be, are damaged, or do not differ.
    """
    infos = [inspect_model(path) for path in (original, tuned)]
    outlines = _outlines(infos, recipe)
    targets = _targets(infos, outlines, recipe)
    with ExitStack() as stack:
        files = [stack.enter_context(info.open()) for info in infos]
        for file in files:
            verify(file)
        hashing = stack.enter_context(ThreadPoolExecutor(1))  # beside the rest, as it reads all of a file
        hashed = hashing.submit(_hash, infos, output, recipe)
        differences = Differences(files, targets, recipe.loaded)
        names = _without_equal_encoders(differences, infos[0].family.text_outputs.prefixes, recipe)
        layers = list(_extracted(differences, names, recipe))
        hashed.result()
    if not any(layer.real for layer in layers):
        hint = "" if recipe.conv_rank else "; with --conv_dim ResNet layers are compared, too"
        raise UserError(
            f"{tuned} and {original} do not differ in the layers of a LoRA beyond the rounding of their number "
            f"formats: there is nothing to extract{hint}"
        )
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= lora_tensors(layer.name, layer.factors, targets[layer.name].shape, len(layer.factors.down))
    kept = _kept(layers)
    metadata = _metadata(infos, outlines[0], layers, targets, recipe, output, kept)
    write_network(output, tensors, recipe.stored, metadata)
    return kept


def _outlines(infos: Sequence[ModelInfo], recipe: Recipe) -> list[Family]:
    """The models without weights. UserError if they are of two families, or not of the one they are said to be."""
    for info in infos:
        if recipe.family not in (None, info.family.name):
            flag = "--v2" if recipe.family == "sd2" else "--sdxl"
            raise UserError(f"{flag}: {info.name} is {info.family.as_kind()}, leave the flag out")
    first, second = infos
    if first.family is not second.family:
        raise UserError(
            f"{second.name} is {second.family.as_kind()} and {first.name} {first.family.as_kind()}: give two models of "
            "one family"
        )
    if first.prediction and second.prediction and first.prediction.kind != second.prediction.kind:
        console.warn(
            f"{first.name} predicts {first.prediction.kind} and {second.name} {second.prediction.kind}: a LoRA cannot "
            "tell programs to change from one to the other"
        )
    return [info.outline() for info in infos]


def _targets(infos: Sequence[ModelInfo], outlines: Sequence[Family], recipe: Recipe) -> dict[str, Target]:
    """The weights that a new LoRA has factors for. UserError if they are not the same in both models."""
    first, second = ({name: layer.weight for name, layer in find_layers(model).items()} for model in outlines)
    points = outlines[0].attach_points()
    unet_targets = UNET_TARGETS | UNET_TARGETS_OF_CONVOLUTIONS if recipe.conv_rank else UNET_TARGETS
    names = find_adapted_layers(points.text_encoder, points.unet, TEXT_ENCODER_TARGETS, unet_targets)
    targets = {name: first[name] for name in names if recipe.conv_rank or not _is_spatial(first[name])}
    other = [name for name, target in targets.items() if second.get(name) != target]
    if other or first.keys() != second.keys():
        where = f"{other[0]} is not the same layer in both" if other else "one has layers that the other has not"
        raise UserError(f"{infos[1].name} is built differently from {infos[0].name}: {where}")
    return targets


def _is_spatial(target: Target) -> bool:
    """Whether it is a convolution that looks at neighbours."""
    return any(size > 1 for size in target.shape[2:])


def _without_equal_encoders(differences: Differences, starts: Sequence[str], recipe: Recipe) -> list[str]:
    """The names of all layers but those of text encoders that are not different enough. `starts`: how the names of each
    text encoder's tensors begin.
    """
    parts: dict[str, list[str]] = {}
    for name in differences.targets:
        parts.setdefault(part_title(name), []).append(name)
    names, encoders = [], iter(starts)
    for part, own in parts.items():
        if own[0].startswith(TEXT):
            besides = differences.besides(next(encoders))
            if not _is_different(differences, part, own, besides, recipe.least_difference):
                continue
        names += own
    return names


def _is_different(
    differences: Differences, part: str, names: Sequence[str], besides: Sequence[str], least: float
) -> bool:
    """Whether the weights of a text encoder differ by more than that and rounding; one that differs less is told, and
    so is what differs `besides` these layers.
    """
    if besides:
        console.warn(f"the {part} differs in {some(besides)}, too, which no LoRA holds: what that does is lost")
    largest, real = 0.0, False
    for name in names:
        found = differences.between(name)
        largest, real = max(largest, found.weight.abs().max().item()), real or found.real
        if largest > least and real:
            return True
    if real:
        console.warn(
            f"the {part} differs by up to {largest:.3g} and is left out, as that is not above --min_diff {least:g}: "
            "with --min_diff 0 it is kept"
        )
    else:
        same = "has the same layers" if besides else "is the same"
        console.notice(f"the {part} {same} in both models and is left out")
    return False


def _extracted(differences: Differences, names: Sequence[str], recipe: Recipe) -> Iterator[Extracted]:
    def extract(difference: Difference) -> Extracted:
        rank = recipe.conv_rank if _is_spatial(differences.targets[difference.name]) else recipe.rank
        return _extract(difference, rank, recipe)

    with progress_bar(total=len(names), desc="extracting", unit="layer", delay=1, leave=False) as bar:
        for layer in in_order(extract, map(differences.between, names)):
            bar.update()
            yield layer


def _extract(difference: Difference, rank: int, recipe: Recipe) -> Extracted:
    weight = difference.weight.to(recipe.device)
    found = largest_svd(weight, rank, exact=recipe.exact)
    norm = squared_norm(weight)
    lost = max(norm - found.s.double().square().sum().item(), 0.0)
    factors = found.truncated(rank)
    clamped = clamp_factors(factors, recipe.clamp_quantile)
    lost_clamped = lost if clamped is factors else squared_error(weight, clamped)
    stored = Factors(*(factor.to("cpu", copy=True) for factor in clamped))  # no views of what is larger
    return Extracted(difference.name, stored, norm, lost, lost_clamped, difference.real)


def clamp_factors(factors: Factors, quantile: float) -> Factors:
    """Both factors, no entry farther from 0 than the quantile of the absolute values of all entries of both."""
    if quantile >= 1:
        return factors
    absolute = torch.cat([factor.flatten() for factor in factors]).abs()
    limit = float(np.quantile(absolute.cpu().numpy(), quantile))  # torch's own takes no large tensors
    return Factors(*(factor.clamp(-limit, limit) for factor in factors))


def _hash(infos: Sequence[ModelInfo], output: Path, recipe: Recipe) -> None:
    """Have the models' hashes found, if the metadata of the file have them."""
    if stores_metadata(output) and not recipe.no_metadata:
        for info in infos:
            _ = info.hashes


def _kept(layers: Sequence[Extracted]) -> list[Kept]:
    parts: dict[str, list[Extracted]] = {}
    for layer in layers:
        parts.setdefault(part_title(layer.name), []).append(layer)
    if len(parts) > 1:
        parts["together"] = list(layers)
    kept = []
    for part, own in parts.items():
        norm = sum(layer.norm for layer in own)
        shares = (sum(getattr(layer, lost) for layer in own) / norm if norm else 0.0 for lost in Extracted._fields[3:5])
        kept.append(Kept(part[0].upper() + part[1:], len(own), *(1 - share for share in shares)))
    return kept


def _metadata(
    infos: Sequence[ModelInfo],
    model: Family,
    layers: Sequence[Extracted],
    targets: Mapping[str, Target],
    recipe: Recipe,
    output: Path,
    kept: Sequence[Kept],
) -> dict[str, str]:
    """Empty where the file stores none."""
    if not stores_metadata(output):
        return {}
    flat, spatial = (
        [len(layer.factors.down) for layer in layers if _is_spatial(targets[layer.name]) == kind]
        for kind in (False, True)
    )
    capped = sum(rank < recipe.rank for rank in flat) + sum(rank < (recipe.conv_rank or 0) for rank in spatial)
    sources = [] if recipe.no_metadata else [source(info.path.name, info.hashes) for info in infos]
    told = made_by(
        "networks/extract_lora_from_models.py",
        sources,
        dim=recipe.rank,
        conv_dim=recipe.conv_rank,
        layers_of_lower_rank=capped,
        clamp_quantile=recipe.clamp_quantile,
        min_diff=recipe.least_difference,
        exact=recipe.exact,
        kept={part.part: round(part.clamped, 6) for part in kept},
    )
    info = infos[0]
    fields = network_metadata(
        (),
        info.family,
        output.stem,
        flat,
        flat,
        made_by=told,
        arguments=convolution_arguments(spatial, [float(rank) for rank in spatial]),
        no_metadata=recipe.no_metadata,
    )
    if recipe.no_metadata:
        return fields
    model.prediction = _prediction(info, recipe)
    described = model.description()
    fields["modelspec.architecture"] = f"{described['modelspec.architecture']}/lora"
    fields["modelspec.prediction_type"] = described["modelspec.prediction_type"]
    fields["ss_sd_model_name"] = info.path.name
    if info.hashes is not None:
        fields |= {"ss_sd_model_hash": info.hashes.legacy, "ss_new_sd_model_hash": info.hashes.sha256}
    return fields


def _prediction(info: ModelInfo, recipe: Recipe) -> Prediction:
    """What a model predicts, by the flag, by its own word, or by its looks."""
    if recipe.v_prediction and info.prediction and info.prediction.kind == "epsilon":
        console.warn(f"{info.name} says that it predicts the noise: by --v_parameterization the LoRA says v")
    if recipe.v_prediction or (info.prediction is None and info.looks_like_v):
        return Prediction("v_prediction")
    return info.prediction or Prediction()
