"""DreamBooth with Stable Diffusion 1.x and 2.x."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from library.errors import UserError
from library.options.base import Settings, option
from library.options.cache import CacheOptions
from library.options.full_model import OneEncoderOptions
from library.options.model import ModelOptions


@dataclass(frozen=True)
class DreamBoothOptions(OneEncoderOptions):
    """How long the text encoder is trained beside the U-Net, and how captions are padded."""

    log_name: ClassVar[str] = "dreambooth"
    scripts: ClassVar[tuple[str, ...]] = ("train_db.py",)
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"--train_text_encoder": "leave it out, this script trains it unless --stop_text_encoder_training -1 is given"}
    )

    stop_text_encoder_training: int | None = option(
        None,
        "train the text encoder for this many steps, and the U-Net alone from then on; 0 or -1: the U-Net alone from "
        "the start; to the end when left out",
        metavar="N",
        minimum=-1,
    )
    no_token_padding: bool = option(
        False, "fill the captions of a batch up to the longest of them only, as the first DreamBooth script did"
    )

    @property
    def text_encoder_steps(self) -> int | None:
        return self.stop_text_encoder_training if self.trains_text_encoder else None

    @property
    def leaves_out_text_encoder(self) -> str | None:
        steps = self.stop_text_encoder_training
        return None if steps is None or steps > 0 else f"with --stop_text_encoder_training {steps}"

    def check(self, settings: Settings) -> None:
        """UserError for captions that cannot go unpadded."""
        length = settings[ModelOptions].max_token_length or 75
        if self.no_token_padding and length > 75:
            raise UserError(
                f"--no_token_padding: captions of {length} tokens are read in passes of 75, which are filled up: drop "
                f"it, or --max_token_length {length}"
            )
        if self.no_token_padding and settings[CacheOptions].text:
            raise UserError(
                "--no_token_padding: how long a caption becomes depends on the others of its batch, so that it cannot "
                "be cached: drop it, or --cache_text_encoder_outputs"
            )
