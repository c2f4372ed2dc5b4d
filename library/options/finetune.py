"""Full fine-tuning: which parts of the model are trained, and what the result is written as."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

_WITH_SAFETENSORS = {"ckpt": "safetensors", "pt": "safetensors", "diffusers": "diffusers_safetensors"}


@dataclass(frozen=True)
class FineTuneOptions:
    """The parts that are trained, and the format of the trained model."""

    title: ClassVar[str] = "fine-tuning"

    train_text_encoder: bool = option(False, "train the text encoder, too, not only the U-Net")
    learning_rate_te: float | None = option(
        None, "learning rate of the text encoder; --learning_rate when left out", metavar="X", minimum=0
    )
    save_model_as: str | None = option(
        None,
        "format of saved models; that of the model they are made from when left out",
        metavar="FORMAT",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
    )
    use_safetensors: bool = option(False, "save as safetensors where --save_model_as is left out")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder is trained."""
        return self.train_text_encoder

    def format(self, base: str) -> str:
        """The format to save in, for a model that was read in the format `base`."""
        if self.save_model_as is not None:
            return self.save_model_as
        return _WITH_SAFETENSORS.get(base, base) if self.use_safetensors else base
