"""Training the weights of the model itself: what the result is written as, and what scripts say of its parts."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.options.base import MethodOptions, option

_WITH_SAFETENSORS = {"ckpt": "safetensors", "pt": "safetensors", "diffusers": "diffusers_safetensors"}


@dataclass(frozen=True)
class FullModelOptions(MethodOptions):
    """The format of a trained model. Scripts that train models have groups of their own, which add to this one."""

    title: ClassVar[str] = "what is trained"
    log_name: ClassVar[str]
    """Default name of the run in the log."""

    save_model_as: str | None = option(
        None,
        "format of saved models; that of the model they are made from when left out",
        metavar="FORMAT",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
    )
    use_safetensors: bool = option(
        False, "save as safetensors, whatever the model that was read is, where --save_model_as is left out"
    )

    @property
    def text_encoder_steps(self) -> int | None:
        """In how many of the run's first steps a text encoder is trained; None: in all."""
        return None

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The learning rate of each block of the U-Net, if they have rates of their own."""
        return None

    @abstractmethod
    def rates(self, learning_rate: float) -> Mapping[str, float]:
        """The learning rate of each part that is asked for: `unet`, and `text_encoder`, numbered from 1 where a model
        has several. `learning_rate` is that of parts without one of their own; parts with 0 are not trained.
        """

    def format(self, base: str) -> str:
        """The format to save in, for a model that was read in the format `base`."""
        if self.save_model_as is not None:
            return self.save_model_as
        return _WITH_SAFETENSORS.get(base, base) if self.use_safetensors else base


@dataclass(frozen=True)
class OneEncoderOptions(FullModelOptions):
    """Models with one text encoder, which may learn at a rate of its own."""

    learning_rate_te: float | None = option(
        None,
        "learning rate of the text encoder, 0 leaves it as it is; --learning_rate when left out",
        metavar="X",
        minimum=0,
    )

    @property
    def trains_text_encoder(self) -> bool:
        return self.leaves_out_text_encoder is None and self.learning_rate_te != 0

    @property
    @abstractmethod
    def leaves_out_text_encoder(self) -> str | None:
        """Which flag is there, or is not, so that the text encoder is not trained, as in a sentence; None if it is."""

    def rates(self, learning_rate: float) -> dict[str, float]:
        rates = {"unet": learning_rate}
        if self.leaves_out_text_encoder is None:
            rates["text_encoder"] = learning_rate if self.learning_rate_te is None else self.learning_rate_te
        elif self.learning_rate_te is not None:
            notice(f"--learning_rate_te has no effect {self.leaves_out_text_encoder}")
        return rates
