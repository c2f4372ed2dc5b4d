"""DreamBooth with Stable Diffusion 1.x and 2.x."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.errors import UserError
from library.options.base import option
from library.options.cache import CacheOptions
from library.options.full_model import FullModelOptions
from library.options.model import ModelOptions


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
        return self._asks_for_text_encoder and self.learning_rate_te != 0

    @property
    def text_encoder_steps(self) -> int | None:
        return self.stop_text_encoder_training if self.trains_text_encoder else None

    @property
    def _asks_for_text_encoder(self) -> bool:
        return self.stop_text_encoder_training is None or self.stop_text_encoder_training > 0

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates = {"unet": learning_rate}
        if self._asks_for_text_encoder:
            rates["text_encoder"] = learning_rate if self.learning_rate_te is None else self.learning_rate_te
        elif self.learning_rate_te is not None:
            notice(
                f"--learning_rate_te has no effect with --stop_text_encoder_training {self.stop_text_encoder_training}"
            )
        return rates

    def check(self, model: ModelOptions, cache: CacheOptions) -> None:
        """UserError for captions that cannot go unpadded."""
        length = model.max_token_length or 75
        if self.no_token_padding and length > 75:
            raise UserError(
                f"--no_token_padding: captions of {length} tokens are read in passes of 75, which are filled up: drop "
                f"it, or --max_token_length {length}"
            )
        if self.no_token_padding and cache.text:
            raise UserError(
                "--no_token_padding: how long a caption becomes depends on the others of its batch, so that it cannot "
                "be cached: drop it, or --cache_text_encoder_outputs"
            )

    def note_unused(self, total_steps: int) -> None:
        """Say if the text encoder is trained to the end of the run all the same."""
        steps = self.text_encoder_steps
        if steps is not None and steps >= total_steps:
            notice(f"--stop_text_encoder_training {steps} has no effect: the run ends at step {total_steps}")
