"""Full fine-tuning and DreamBooth with SDXL."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.options.base import option
from library.options.full_model import FullModelOptions


@dataclass(frozen=True)
class SdxlFineTuneOptions(FullModelOptions):
    """The parts that are trained, and their learning rates."""

    log_name: ClassVar[str] = "finetuning"

    train_text_encoder: bool = option(False, "train both text encoders, too, not only the U-Net")
    learning_rate_te1: float | None = option(
        None, "learning rate of the first text encoder (ViT-L); --learning_rate when left out", metavar="X", minimum=0
    )
    learning_rate_te2: float | None = option(
        None, "learning rate of the second text encoder (BiG-G); --learning_rate when left out", metavar="X", minimum=0
    )
    block_lr: str | None = option(
        None,
        "learning rates of the U-Net's 23 blocks in place of --learning_rate: embeddings, 9 input blocks, 3 middle "
        "blocks, 9 output blocks, last layer",
        metavar="X,X,...",
    )

    @property
    def trains_text_encoder(self) -> bool:
        return self.train_text_encoder

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates, own = {"unet": learning_rate}, (self.learning_rate_te1, self.learning_rate_te2)
        for number, rate in enumerate(own, 1):
            if self.train_text_encoder:
                rates[f"text_encoder_{number}"] = learning_rate if rate is None else rate
            elif rate is not None:
                notice(f"--learning_rate_te{number} has no effect without --train_text_encoder")
        return rates
