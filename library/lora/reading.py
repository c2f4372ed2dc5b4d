"""Networks' files: which layers they change, and how."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import console
from library.errors import UserError, some
from library.lora.changes import Change
from library.lora.kinds import RANKED, UnknownParts, change_of
from library.lora.names import STARTS
from library.lora.spellings import ALPHA, DOWN, MAGNITUDE, UP, Spelled, read_keys
from library.models.files.checkpoint import WeightsFile, is_finite, open_weights

__all__ = ["ALPHA", "DOWN", "UP", "NetworkFile", "NotANetwork", "UnknownKind", "open_network"]

_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model", "adapter_config.json"
_SINGLE = (ALPHA, "scalar")  # parts that are one number
_FLAG = "on_input"


class NotANetwork(UserError):
    """A file has no tensor that is known as a network's."""


class UnknownKind(UserError):
    """What a file does to a layer is of no kind that is known here."""


class NetworkFile(AbstractContextManager["NetworkFile"]):
    """An open file of a network, whichever program has written it; a context manager. Tensors are read when a layer's
    change is asked for.

    `layers`: the names of the layers that it changes, as our own files spell them -> part of the change -> key in the
    file; `foreign`: whether the file spells them in another way; `sdxl`: whether it is for SDXL. `unet`: of the model
    that it is for, if that is known.
    """

    def __init__(self, file: WeightsFile, unet: nn.Module | None = None):
        self.path, self.metadata = file.path, file.metadata
        self._file = file
        self.layers: dict[str, dict[str, str]] = {}
        keys, self.sdxl = read_keys(file.shapes(), file.metadata, unet)
        for key, spelled in keys.items():
            parts = self.layers.setdefault(spelled.name, {})
            if spelled.part in parts:
                raise UserError(
                    f"{self.path} has two tensors for the same of {spelled.name}, {parts[spelled.part]} and {key}: "
                    "two networks were thrown together, use them one by one"
                )
            parts[spelled.part] = key
        if not any(name.startswith(STARTS) for name in self.layers):
            raise NotANetwork(
                f"{self.path} is no network's file: no tensor's name begins with {' or '.join(STARTS)}, and none is "
                "one of Diffusers or peft for Stable Diffusion"
            )
        self.foreign = any(not key.startswith(spelled.name) for key, spelled in keys.items())
        self._alphas = self._find_alphas(keys.values())

    def change(self, name: str) -> Change:
        """What it does to this layer, in float32, with finite numbers alone. UnknownKind if that is not known here,
        UserError if it contradicts itself or is damaged.
        """
        if "" in self.layers[name]:
            raise UnknownKind(
                f"{self.path} holds {name}, which changes no layer of a model: take it out with the program that has "
                "written the file"
            )
        parts = {part: self._read(part, key) for part, key in self.layers[name].items()}
        try:
            _check(parts)
            alpha = float(parts.pop(ALPHA).item()) if ALPHA in parts else self._alphas.get(name, 0.0)
            return change_of(parts, alpha)
        except UnknownParts as problem:
            raise UnknownKind(
                f"{self.path} changes {name} in a way that is not known here, {problem}: give a LoRA, DoRA, LoHa, "
                "LoKr, OFT, IA3 or full difference, or merge it with the program that it was trained with"
            ) from None
        except ValueError as problem:
            raise UserError(f"{self.path} changes {name} {problem}: it is damaged, get or save it anew") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The parts of what it does to this layer, as they are stored."""
        return {part: self._file.get(key) for part, key in self.layers[name].items()}

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Those of the parts of what it does to this layer, as they are stored."""
        return {part: self._file.shape(key) for part, key in self.layers[name].items()}

    def number_format(self) -> torch.dtype:
        """The one that its matrices are stored in; float32 if there are several, or none of floating-point numbers."""
        keys = [key for parts in self.layers.values() for key in parts.values() if len(self._file.shape(key)) > 1]
        formats = {self._file.dtype(key) for key in keys}
        own = formats.pop() if len(formats) == 1 else torch.float32
        return own if own.is_floating_point else torch.float32

    def rank(self, name: str) -> int | None:
        """The rank that alpha is compared with; None if its change has none."""
        parts = self.layers[name]
        return next((self._file.shape(parts[part])[0] for part in RANKED if part in parts), None)

    def width(self, name: str) -> int | None:
        """How many values the layer reads, or channels; None if its change is no LoRA."""
        key = self.layers[name].get(DOWN)
        return None if key is None else self._file.shape(key)[1]

    def verify(self) -> None:
        """UserError if its contents are damaged, as far as the file can tell."""
        self._file.verify()

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read(self, part: str, key: str) -> Tensor:
        tensor = self._file.get(key, torch.float32)
        # peft has one value for each output, in a shape of its own
        return tensor.flatten() if part == MAGNITUDE and not key.endswith(MAGNITUDE) else tensor

    def _find_alphas(self, keys: Iterable[Spelled]) -> dict[str, float]:
        """Those of layers that have none of their own. UserError if it is not known what they are."""
        ranks = {name: rank for name in self.layers if (rank := self.rank(name)) is not None}
        missing = ranks.keys() - {name for name in ranks if ALPHA in self.layers[name]}
        alphas: dict[str, float] = {}
        configs = _peft_configs(self.path, self.metadata) if missing else {}
        for spelled in keys:
            config = configs.get(spelled.root, configs.get("")) if spelled.root else None
            if config and spelled.name in missing:
                try:
                    alphas[spelled.name] = _peft_alpha(config, spelled.path, ranks[spelled.name])
                except (TypeError, ValueError, AttributeError, re.error) as problem:
                    raise UserError(
                        f"{self.path}: the alpha that peft says of {spelled.name} cannot be read: {problem}"
                    ) from None
        missing -= alphas.keys()
        if len(missing) < len(ranks) and missing:
            raise UserError(
                f"{self.path} has no alpha for {len(missing)} of its {len(ranks)} layers, {some(sorted(missing))}: it "
                "is damaged or half-made, get or save it anew"
            )
        if missing:
            console.notice(f"{self.path.name} has no alphas, so its ranks are taken for them: it acts in full")
        return {name: float(rank) for name, rank in ranks.items()} | alphas


def open_network(path: Path, unet: nn.Module | None = None) -> NetworkFile:
    """UserError if it is missing, damaged or no network's file. `unet`: that of a model's attach points, for which the
    names are then read; needed only for SDXL of another structure than the published one.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the .safetensors or .ckpt file of the network itself")
    file = open_weights(path)
    try:
        return NetworkFile(file, unet)
    except BaseException:
        file.close()
        raise


def _check(parts: Mapping[str, Tensor]) -> None:
    """ValueError, with the end of a sentence, for what can be no part of a change."""
    for part, tensor in parts.items():
        if part in _SINGLE and tensor.numel() != 1:
            raise ValueError(f"with {tensor.numel()} numbers as its {part} and not one")
        if not tensor.numel():
            raise ValueError(f"by nothing, since its {part} is empty, as of rank 0")
        if part not in (*_SINGLE, _FLAG) and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"by whole numbers, since its {part} is stored as {kind}")
        if not is_finite(tensor):
            raise ValueError(
                f"by numbers that are not finite, in its {part} (networks/check_lora_weights.py lists all of them)"
            )


def _peft_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What peft, or Diffusers with it, says of the adapter in a file, by the part of a pipeline; by no name, what holds
    for any part. UserError if it cannot be read.
    """
    beside = path.with_name(_PEFT_CONFIG)
    try:
        if path.stem == _PEFT_FILE and beside.exists():
            return {"": dict(json.loads(beside.read_text(encoding="utf-8")))}
        said = dict(json.loads(metadata.get(_DIFFUSERS_CONFIG, "{}")))
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(f"{path}: what peft says of its alphas cannot be read: {problem}") from None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        root, _, field = key.rpartition(".")
        configs.setdefault(root, {})[field] = value
    return configs


def _peft_alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """As peft finds it: `alpha_pattern` has ends of paths. With `use_rslora` the scale is alpha / sqrt(rank)."""
    patterns = config.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    alpha = float(next(found, config.get("lora_alpha", rank)))
    if not math.isfinite(alpha):
        raise ValueError(f"{alpha} is none")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
