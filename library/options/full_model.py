"""Training the weights of the model itself: what the result is written as, and what scripts say of its parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

_WITH_SAFETENSORS = {"ckpt": "safetensors", "pt": "safetensors", "diffusers": "diffusers_safetensors"}


@dataclass(frozen=True)
class FullModelOptions:
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
    use_safetensors: bool = option(False, "save as safetensors where --save_model_as is left out")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether a text encoder may be trained, as far as can be told without --learning_rate."""
        raise NotImplementedError

    @property
    def text_encoder_steps(self) -> int | None:
        """In how many of the run's first steps a text encoder is trained; None: in all."""
        return None

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The learning rate of each block of the U-Net, if they have rates of their own."""
        return None

    def rates(self, learning_rate: float) -> Mapping[str, float]:
        """The learning rate of each part that is asked for: `unet`, and `text_encoder`, numbered from 1 where a model
        has several. `learning_rate` is that of parts without one of their own; parts with 0 are not trained.
        """
        raise NotImplementedError

    def format(self, base: str) -> str:
        """The format to save in, for a model that was read in the format `base`."""
        if self.save_model_as is not None:
            return self.save_model_as
        return _WITH_SAFETENSORS.get(base, base) if self.use_safetensors else base
