"""Full fine-tuning and DreamBooth with SDXL."""

import math
from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.errors import UserError
from library.options.base import Settings, option
from library.options.full_model import FullModelOptions


@dataclass(frozen=True)
class SdxlFineTuneOptions(FullModelOptions):
    """The parts that are trained, and their learning rates."""

    log_name: ClassVar[str] = "finetuning"
    scripts: ClassVar[tuple[str, ...]] = ("sdxl_train.py",)

    train_text_encoder: bool = option(False, "train both text encoders, too, not only the U-Net")
    learning_rate_te1: float | None = option(
        None,
        "learning rate of the first text encoder (ViT-L), 0 leaves it as it is; --learning_rate when left out",
        metavar="X",
        minimum=0,
    )
    learning_rate_te2: float | None = option(
        None,
        "learning rate of the second text encoder (ViT-bigG), 0 leaves it as it is; --learning_rate when left out",
        metavar="X",
        minimum=0,
    )
    block_lr: str | None = option(
        None,
        "learning rates of the U-Net's 23 blocks in place of --learning_rate, 0 leaves a block as it is: 0 embeddings, "
        "1-9 input blocks, 10-12 middle blocks, 13-21 output blocks, 22 last layers",
        metavar="X,X,...",
    )

    def __post_init__(self) -> None:
        _ = self.block_rates  # which refuses what are no rates

    @property
    def trains_text_encoder(self) -> bool:
        return self.train_text_encoder and (self.learning_rate_te1 != 0 or self.learning_rate_te2 != 0)

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        if not self.block_lr:
            return None
        return tuple(_rate(text.strip(), block) for block, text in enumerate(self.block_lr.split(",")))

    def check(self, settings: Settings) -> None:
        encoders = self.train_text_encoder and None in (self.learning_rate_te1, self.learning_rate_te2)
        if self.block_lr and "learning_rate" in settings.given and not encoders:
            notice("--learning_rate has no effect: --block_lr has a rate for each block of the U-Net")

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates = {"unet": learning_rate if self.block_rates is None else max(self.block_rates)}
        own = (self.learning_rate_te1, self.learning_rate_te2)
        for number, rate in enumerate(own, 1):
            if self.train_text_encoder:
                rates[f"text_encoder_{number}"] = learning_rate if rate is None else rate
            elif rate is not None:
                notice(f"--learning_rate_te{number} has no effect without --train_text_encoder")
        return rates


def _rate(text: str, block: int) -> float:
    """UserError for what is no learning rate."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise UserError(f"--block_lr: {text!r}, the value of block {block}, is not a number of 0 or more")
    return rate
