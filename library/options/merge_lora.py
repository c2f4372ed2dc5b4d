"""Merging networks into a model, or into one another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

_FORMATS = ("float", "fp16", "bf16")


@dataclass(frozen=True)
class MergingOptions:
    """Which networks become one, how strongly each counts, and what is written."""

    title: ClassVar[str] = "merging networks"

    save_precision: str | None = option(
        None, "number format of the result; that of --precision when left out", metavar="FORMAT", choices=_FORMATS
    )
    precision: str = option(
        "float", "number format of the result; sums are always made in float", metavar="FORMAT", choices=_FORMATS
    )
    save_to: str | None = option(
        None, "what to write: a file by its ending, .safetensors or .ckpt; a model also as a folder", metavar="PATH"
    )
    models: tuple[str, ...] | None = option(None, "networks to merge, in this order", metavar="FILE")
    ratios: tuple[float, ...] | None = option(
        None, "strength of each network, in their order; 1 for all when left out", metavar="RATIO"
    )
    no_metadata: bool = option(False, "note only what programs need to use the result, not what it was made from")

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("--models: no networks are given, give one or more files to merge")
        if not self.save_to:
            raise UserError("--save_to: the file to write is not named, give a name ending in .safetensors or .ckpt")
        self.check_count("ratios", "ratio", self.ratios)

    def check_count(self, flag: str, what: str, values: tuple[float, ...] | tuple[str, ...] | None) -> None:
        """UserError if a flag has not as many values as there are networks."""
        if values is not None and len(values) != len(self.models):
            raise UserError(
                f"--{flag}: {len(values)} for {len(self.models)} networks, give one {what} for each of --models, in "
                "order"
            )

    @property
    def networks(self) -> tuple[Path, ...]:
        """The files of --models."""
        return tuple(map(Path, self.models))

    @property
    def target(self) -> Path:
        """--save_to."""
        return Path(self.save_to)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each network."""
        return self.ratios or (1.0,) * len(self.models)

    @property
    def saved_as(self) -> str:
        """The number format of the result."""
        return self.save_precision or self.precision


@dataclass(frozen=True)
class _MergeOptions(MergingOptions):
    """What the scripts for all families have."""

    sd_model: str | None = option(
        None,
        "model that the networks become part of: a file, a Diffusers folder, or owner/name on the hub; without one "
        "they are merged into one network",
        metavar="MODEL",
    )
    concat: bool = option(False, "put networks of any ranks side by side, for a network with the sum of their ranks")
    shuffle: bool = option(False, "change the order within the ranks, so that --concat cannot be undone")
    allow_partial: bool = option(False, "leave out what a network has for layers that the model has not")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow_partial and self.sd_model is None:
            raise UserError("--allow_partial is for networks that become part of a model: give --sd_model, or drop it")


@dataclass(frozen=True)
class MergeLoraOptions(_MergeOptions):
    """Which networks of Stable Diffusion 1.x or 2.x become part of what."""

    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"--lbws": "networks/svd_merge_lora.py takes block weights, and for SDXL networks/sdxl_merge_lora.py"}
    )
    v2: bool = option(False, "refuse anything but Stable Diffusion 2.x; which it is shows in the files")


@dataclass(frozen=True)
class SdxlMergeLoraOptions(_MergeOptions):
    """Which networks of SDXL become part of what."""

    lbws: tuple[str, ...] | None = option(
        None, "for each network the weights of the model's blocks, as a JSON list of 12 or 20 numbers", metavar="LIST"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("lbws", "list", self.lbws)
