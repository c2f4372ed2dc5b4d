"""Full fine-tuning of Stable Diffusion 1.x and 2.x."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option
from library.options.full_model import OneEncoderOptions


@dataclass(frozen=True)
class FineTuneOptions(OneEncoderOptions):
    """The parts that are trained."""

    log_name: ClassVar[str] = "finetuning"
    scripts: ClassVar[tuple[str, ...]] = ("fine_tune.py",)

    train_text_encoder: bool = option(False, "train the text encoder, too, not only the U-Net")

    @property
    def leaves_out_text_encoder(self) -> str | None:
        return None if self.train_text_encoder else "without --train_text_encoder"
