"""Which model is trained."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt")


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    title: ClassVar[str] = "model"

    pretrained_model_name_or_path: str | None = option(
        None, "the model to start from: one .safetensors or .ckpt file", metavar="FILE"
    )
