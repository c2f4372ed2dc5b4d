"""Networks that become part of a model: its weights are changed one by one, while they are written."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from library import console
from library.bars import progress_bar
from library.errors import UserError, some
from library.lora.changes import Change, misfit
from library.lora.metadata import base_of
from library.lora.names import part_title
from library.lora.reading import NetworkFile, open_network
from library.lora.sources import Addition
from library.lora.targets import Layer, Target, find_layers
from library.lora.threads import in_order, one_thread_each
from library.models import loading
from library.models.diffusers_writer import check_replaceable, write_folder
from library.models.family import Family
from library.models.files.checkpoint import (
    LazyTensors,
    WeightsFile,
    is_finite,
    stores_metadata,
    write_tensors,
    writing_order,
)
from library.models.files.weights_file import cast, stored_dtype
from library.models.merging import INHERITED, Source, Watched, provenance, read_tensor, verify, warn_not_finite
from library.models.prediction import markers, warn_of_v
from library.models.registry import ModelInfo, public_name
from library.models.sgm_keys import is_dropped, usual_keys
from library.suffixes import WEIGHTS_SUFFIXES

_OF_A_MODEL = ("modelspec.sai_model_spec", *INHERITED)  # what is left with --no_metadata
_FROM_PREDICTION = ("modelspec.prediction_type", "modelspec.architecture")


class _Part(NamedTuple):
    """What one network adds to a layer's weight, or to its bias."""

    network: NetworkFile
    layer: str
    strength: float
    bias: bool


class MergedModel(WeightsFile):
    """A model's file with networks added to its weights. Sums are made in float32, one tensor at a time, and rounded
    once; what no network changes is cast alone. Floating-point tensors are `stored` as asked for. Several threads may
    ask for tensors.

    Averaged copies from training are left out: they would not be those of the changed weights.
    """

    def __init__(self, file: WeightsFile, info: ModelInfo, stored: torch.dtype):
        self.path, self.metadata, self.configs = file.path, file.metadata, file.configs
        self._file, self._stored = file, stored
        self._reading = Lock()  # files are read at one place at a time
        said = markers(info.prediction) if info.prediction else {}
        names = usual_keys(file)
        self._keys = {name: key for name, key in names.items() if not is_dropped(name)}
        self._made = {name: tensor for name, tensor in said.items() if name not in names}
        self.left_out = sum(map(is_dropped, names))
        self._changes: dict[str, dict[Target, list[_Part]]] = {}  # by key

    def add(self, target: Target, part: _Part) -> None:
        """Have a part of a network, after those that are there already, change what lies at a place."""
        self._changes.setdefault(self._keys[target.key], {}).setdefault(target, []).append(part)

    @property
    def changed(self) -> int:
        """How many tensors networks change."""
        return len(self._changes)

    def keys(self) -> list[str]:
        return [*self._keys.values(), *self._made]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._made[key].shape) if key in self._made else self._file.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        own = self._made[key].dtype if key in self._made else self._file.dtype(key)
        return stored_dtype(torch.empty(0, dtype=own, device="meta"), self._stored)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        stored = dtype or self._stored
        if key in self._made:
            return cast(self._made[key], stored)
        if key not in self._changes:
            with self._reading:
                tensor = read_tensor(self._file, key)
            return cast(tensor, stored)
        with self._reading:
            weight = read_tensor(self._file, key, torch.float32)
        for target, parts in self._changes[key].items():
            self._change(weight, target, parts)
        return cast(weight, stored)

    def _change(self, weight: Tensor, target: Target, parts: Sequence[_Part]) -> None:
        place = (weight.T if target.turned else weight)[target.start : target.start + target.shape[0]]
        total = place.contiguous().view(target.shape)
        for part in parts:
            with self._reading:
                change = read_change(part.network, part.layer)
            if part.bias:
                total = total + part.strength * change.bias
            else:
                total = change.applied(total, part.strength).reshape(target.shape)
        if total.data_ptr() != place.data_ptr():
            place.copy_(total.reshape(place.shape))

    def close(self) -> None:
        self._file.close()


class _Ahead(LazyTensors):
    """A file's tensors, made by several threads a few before the one who writes `output` asks for them."""

    def __init__(self, file: WeightsFile, output: Path):
        self._file = file
        self.results = in_order(lambda key: (key, file.get(key)), writing_order(output, self))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        made, tensor = next(self.results)
        assert made == key, f"{key} was asked for before {made}"
        return tensor

    def outlines(self) -> Mapping[str, Tensor]:
        file = self._file
        return {key: torch.empty(file.shape(key), dtype=file.dtype(key), device="meta") for key in self}


def read_change(network: NetworkFile, layer: str) -> Change:
    """As `NetworkFile.change`. UserError also if the disk does not give it."""
    try:
        return network.change(layer)
    except OSError as error:  # said here, since in the middle of writing it would look like a mistake of the output's
        raise UserError(f"{network.path} cannot be read: {error.strerror}") from error


@torch.no_grad()
def merge_into_model(
    info: ModelInfo,
    additions: Sequence[Addition],
    output: Path,
    stored: torch.dtype,
    *,
    no_metadata: bool = False,
    allow_partial: bool = False,
) -> None:
    """Write a model with networks added to it, in their order: W + strength * alpha / rank * up @ down, and what other
    kinds of networks do. A single file by the ending of `output`, streamed; else a Diffusers folder, for which the
    result is in memory as `stored`. Nothing appears under the name before it is whole.

    UserError for a network that is damaged, not finite, for another family of models, or, unless `allow_partial`, with
    layers that the model has not, or has in other shapes; as from `write_tensors` and `write_folder`.
    """
    to_file = output.suffix.lower() in WEIGHTS_SUFFIXES
    if not to_file:
        check_replaceable(output, keep=[info.path, *(addition.path for addition in additions)])
    with ExitStack() as stack:
        file = stack.enter_context(info.open())
        networks = [stack.enter_context(open_network(addition.path)) for addition in additions]
        for network in networks:
            _check_base(network, info)
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        sources = hashing.submit(_look_through, info, networks, no_metadata)
        model = info.outline()
        model.prediction = info.prediction or model.prediction
        merged = MergedModel(file, info, stored)
        layers = find_layers(model)
        for network, addition in zip(networks, additions, strict=True):
            _add(merged, network, addition, layers, info, allow_partial)
        metadata = _metadata(info, model, file.metadata, additions, sources.result(), output.stem)
        if no_metadata:
            metadata = {name: text for name, text in metadata.items() if name in _OF_A_MODEL}
        _tell(merged)
        if to_file:
            _write_file(merged, output, metadata if stores_metadata(output) else None)
        else:
            _write_folder(merged, info, output, metadata)


def _check_base(network: NetworkFile, info: ModelInfo) -> None:
    base = base_of(network)
    if base is not None and base is not info.family:
        raise UserError(
            f"{network.path} is for {base.title} and {info.name} is {info.family.as_kind()}: give a network for this "
            "family"
        )


def _look_through(info: ModelInfo, networks: Sequence[NetworkFile], no_metadata: bool) -> list[Source]:
    """Read all files to their ends: whether they are what their hashes say, and what these are."""
    with info.open() as file:
        verify(file)
    for network in networks:
        with open_network(network.path) as again:  # the other is being read
            again.verify()
    if no_metadata:
        return []
    name = public_name(info.name)
    own = Source(name, name if info.path.is_dir() else info.path.stem, info.hashes)
    return [own, *(Source.of(network.path) for network in networks)]


def _add(
    merged: MergedModel,
    network: NetworkFile,
    addition: Addition,
    layers: Mapping[str, Layer],
    info: ModelInfo,
    allow_partial: bool,
) -> None:
    """Have a network change a model. UserError if it cannot."""
    fitting, unfit = [], []
    for name in network.layers:
        layer = layers.get(name)
        if layer is None:
            unfit.append(name)
            continue
        change = read_change(network, name)
        if reason := misfit(change, layer.weight.shape, layer.bias is not None):
            unfit.append(f"{name} ({reason})")
            continue
        fitting.append(name)
        strength = addition.strength(name)
        if not strength:
            continue
        merged.add(layer.weight, _Part(network, name, strength, bias=False))
        if change.bias is not None:
            merged.add(layer.bias, _Part(network, name, strength, bias=True))
    told = _by_part(fitting, network)
    if not fitting:
        raise UserError(
            f"{network.path} has no layer that {info.name} has: it is for another kind of model, its layers are named "
            f"{some(unfit)}"
        )
    console.notice(f"{network.path.name}: found in the model {told}")
    if unfit and not allow_partial:
        raise UserError(
            f"{network.path} has {len(unfit)} layers that do not fit {info.name}, {some(unfit)}: give the kind of "
            "model that it was trained on, or leave them out with --allow_partial"
        )
    if unfit:
        console.warn(f"{network.path.name}: {len(unfit)} layers do not fit the model and are left out: {some(unfit)}")


def _by_part(fitting: Sequence[str], network: NetworkFile) -> str:
    """How many layers of which part of a model, as in a sentence."""
    counts: dict[str, list[int]] = {}
    for name in sorted(network.layers, reverse=True):  # the U-Net first
        counts.setdefault(part_title(name), [0, 0])[1] += 1
    for name in fitting:
        counts[part_title(name)][0] += 1
    return ", ".join(f"{own} of {total} layers of the {title}" for title, (own, total) in counts.items())


def _metadata(
    info: ModelInfo,
    model: Family,
    told: Mapping[str, str],
    additions: Sequence[Addition],
    sources: Sequence[Source],
    title: str,
) -> dict[str, str]:
    """What the model's file says of itself, or follows from it, and what it was made from, if there are `sources`."""
    own = model.description()
    if info.prediction is None:  # what it predicts is for others to find out
        own = {name: text for name, text in own.items() if name not in _FROM_PREDICTION}
    recipe = {
        "type": "atelier",
        "models": [source.hashes.sha256 if source.hashes else source.file_name for source in sources],
        "ratios": [1.0, *(addition.ratio for addition in additions)],
        "block_weights": [list(addition.blocks.values) if addition.blocks else None for addition in additions],
        "precision": "float32",
    }
    return own | provenance(title, told, sources, recipe)


def _tell(merged: MergedModel) -> None:
    console.notice(f"{merged.changed} of the model's {len(merged.keys())} tensors are changed")
    if merged.left_out:
        console.notice(f"{merged.left_out} tensors of training (averaged weights, losses) are left out")


def _write_file(merged: MergedModel, output: Path, metadata: Mapping[str, str] | None) -> None:
    ahead = _Ahead(merged, output)
    with (
        progress_bar(total=len(ahead), desc="merging", unit="tensor", delay=1, leave=False) as bar,
        closing(ahead.results),
    ):
        watched = Watched(ahead, bar)
        write_tensors(output, watched, None, metadata, content_hash=True, beside={})
    warn_not_finite(output, watched.not_finite)


def _write_folder(merged: MergedModel, info: ModelInfo, output: Path, metadata: Mapping[str, str]) -> None:
    if info.prediction is None and info.looks_like_v:
        warn_of_v(info.name)
    with one_thread_each():
        model = loading.load(info.family, merged, None)
    model.prediction = info.prediction or model.prediction
    write_folder(model, output, None, metadata=metadata)
    warn_not_finite(output, [name for name, tensor in model.state_dict().items() if not is_finite(tensor)])
