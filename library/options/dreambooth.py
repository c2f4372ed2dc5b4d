"""DreamBooth with Stable Diffusion 1.x and 2.x."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.options.base import option
from library.options.full_model import FullModelOptions


@dataclass(frozen=True)
class DreamBoothOptions(FullModelOptions):
    """How long the text encoder is trained beside the U-Net, and how captions are padded."""

    log_name: ClassVar[str] = "dreambooth"

    learning_rate_te: float | None = option(
        None, "learning rate of the text encoder; --learning_rate when left out", metavar="X", minimum=0
    )
    stop_text_encoder_training: int | None = option(
        None,
        "train the text encoder for this many steps, and the U-Net alone from then on; to the end when left out, -1 "
        "trains the U-Net alone",
        metavar="N",
        minimum=-1,
    )
    no_token_padding: bool = option(
        False, "fill the captions of a batch up to the longest of them only, as the first DreamBooth script did"
    )

    @property
    def trains_text_encoder(self) -> bool:
        return self.stop_text_encoder_training is None or self.stop_text_encoder_training > 0

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates = {"unet": learning_rate}
        if self.trains_text_encoder:
            rates["text_encoder"] = learning_rate if self.learning_rate_te is None else self.learning_rate_te
        elif self.learning_rate_te is not None:
            notice(
                f"--learning_rate_te has no effect with --stop_text_encoder_training {self.stop_text_encoder_training}"
            )
        return rates
