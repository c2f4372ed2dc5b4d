"""The network (LoRA or a relative) that is trained beside a frozen model."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import ClassVar

from library.console import notice
from library.errors import UserError, suggest_path
from library.options.base import MethodOptions, Settings, option, parse_key_values
from library.options.resume import ResumeOptions
from library.suffixes import WEIGHTS_SUFFIXES

_PYTHON = ".py"
_FOR_UNET_ONLY = ("networks.oft",)


@dataclass(frozen=True)
class NetworkOptions(MethodOptions):
    """The network and its learning rates."""

    title: ClassVar[str] = "network"
    scripts: ClassVar[tuple[str, ...]] = ("train_network.py", "sdxl_train_network.py")

    network_module: str | None = option(
        None, "Python module of the network, such as networks.lora, or a .py file", metavar="MODULE"
    )
    network_weights: str | None = option(None, "go on with the network in this file", metavar="FILE")
    dim_from_weights: bool = option(False, "make the network with the ranks and alphas of --network_weights")
    network_dim: int | None = option(None, "rank of the network; 4 when left out", metavar="N", minimum=1)
    network_alpha: float = option(
        1, "the network's effect is scaled by alpha / rank, so alpha = rank leaves it as it is", metavar="X", minimum=0
    )
    network_dropout: float | None = option(
        None,
        "chance (0 to 1) that a neuron of the network is left out in a step; none when left out",
        metavar="X",
    )
    network_args: tuple[str, ...] | None = option(None, "further arguments of the network module", metavar="NAME=VALUE")
    unet_lr: float | None = option(
        None, "learning rate of the U-Net's part; --learning_rate when left out", metavar="X", minimum=0
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "learning rate of the text encoder's part, one for each encoder; --learning_rate when left out",
        metavar="X",
        minimum=0,
    )
    base_weights: tuple[str, ...] | None = option(
        None, "files of networks that are merged into the model before it is trained on", metavar="FILE"
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "how strongly each of --base_weights is merged; 1 for those that have none", metavar="X"
    )
    scale_weight_norms: float | None = option(
        None,
        "after every step, scale each module of the network down to this norm where its is larger; 1 is a good start",
        metavar="X",
        minimum=0,
    )
    network_train_unet_only: bool = option(False, "train only the U-Net's part")
    network_train_text_encoder_only: bool = option(False, "train only the text encoder's part")
    save_model_as: str = option(
        "safetensors", "format of saved networks", metavar="FORMAT", choices=("ckpt", "pt", "safetensors")
    )

    def __post_init__(self) -> None:
        if self.network_train_text_encoder_only and self.network_module in _FOR_UNET_ONLY:
            raise UserError(
                f"--network_train_text_encoder_only: {self.network_module} has no part for the text encoder, drop it"
            )
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise UserError(
                "--network_train_unet_only, --network_train_text_encoder_only: together they leave nothing to train, "
                "drop one of them"
            )
        if not 0 <= (self.network_dropout or 0) < 1:
            raise UserError(f"--network_dropout: {self.network_dropout} is not a chance, use 0 or more and less than 1")
        if self.dim_from_weights and not self.network_weights:
            raise UserError("--dim_from_weights takes ranks from a file: give --network_weights one, or drop it")
        parse_key_values(self.network_args or (), "--network_args")
        files, strengths = len(self.base_weights or ()), len(self.base_weights_multiplier or ())
        if strengths > files:
            raise UserError(
                f"--base_weights_multiplier: {strengths} values are given for {files} --base_weights, drop what is too "
                "much"
            )

    @property
    def base_networks(self) -> list[tuple[Path, float]]:
        """--base_weights, each with its multiplier."""
        strengths = chain(self.base_weights_multiplier or (), repeat(1.0))
        return [(Path(name), strength) for name, strength in zip(self.base_weights or (), strengths, strict=False)]

    def check(self, settings: Settings) -> None:
        """UserError for files that are missing; one to start from is not needed by a run that resumes, unless the
        network is made as it says.
        """
        resumes = bool(settings[ResumeOptions].resume)
        if names_file(self.network_module):
            _require("--network_module", Path(self.network_module), (_PYTHON,))
        if self.network_weights and (self.dim_from_weights or not resumes):
            _require("--network_weights", Path(self.network_weights), WEIGHTS_SUFFIXES)
        for path, _ in self.base_networks:
            _require("--base_weights", path, WEIGHTS_SUFFIXES)
        for name in ("network_dim", "network_alpha"):
            if self.dim_from_weights and name in settings.given:
                notice(f"--{name} has no effect with --dim_from_weights, which takes it from the file")
        if self.text_encoder_lr and self.network_module in _FOR_UNET_ONLY:
            notice(f"--text_encoder_lr has no effect: {self.network_module} has no part for the text encoder")

    @property
    def rank(self) -> int:
        """The rank to make the network with."""
        return 4 if self.network_dim is None else self.network_dim

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the network has a part for the text encoder."""
        return not (self.network_train_unet_only or self.network_module in _FOR_UNET_ONLY)

    @property
    def network_keywords(self) -> dict[str, str]:
        """`network_args` as name -> value, both as written."""
        return parse_key_values(self.network_args or (), "--network_args")


def names_file(network_module: str | None) -> bool:
    """Whether --network_module is a path and not a name to import."""
    return bool(network_module) and network_module.endswith(_PYTHON)


def _require(flag: str, path: Path, suffixes: Collection[str]) -> None:
    if not path.is_file():
        raise UserError(f"{flag}: {path} is no file{suggest_path(path, suffixes)}")
