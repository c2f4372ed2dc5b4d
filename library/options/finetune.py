"""Full fine-tuning of Stable Diffusion 1.x and 2.x."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.options.base import option
from library.options.full_model import FullModelOptions


@dataclass(frozen=True)
class FineTuneOptions(FullModelOptions):
    """The parts that are trained."""

    log_name: ClassVar[str] = "finetuning"

    train_text_encoder: bool = option(False, "train the text encoder, too, not only the U-Net")
    learning_rate_te: float | None = option(
        None, "learning rate of the text encoder; --learning_rate when left out", metavar="X", minimum=0
    )

    @property
    def trains_text_encoder(self) -> bool:
        return self.train_text_encoder and self.learning_rate_te != 0

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates = {"unet": learning_rate}
        if self.train_text_encoder:
            rates["text_encoder"] = learning_rate if self.learning_rate_te is None else self.learning_rate_te
        elif self.learning_rate_te is not None:
            notice("--learning_rate_te has no effect without --train_text_encoder")
        return rates
