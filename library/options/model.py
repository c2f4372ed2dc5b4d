"""Which model is trained, and how it reads captions."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt")


@dataclass(frozen=True)
class ModelOptions:
    """The base model, and how its text encoders read captions."""

    title: ClassVar[str] = "model"

    pretrained_model_name_or_path: str | None = option(
        None, "the model to start from: one .safetensors or .ckpt file", metavar="FILE"
    )
    max_token_length: int | None = option(
        None, "tokens of a caption that are read, 75 when left out", metavar="N", choices=(75, 150, 225)
    )
    clip_skip: int | None = option(
        None, "take the text encoder's answer from its Nth layer from the end; 1 is the last", metavar="N", minimum=1
    )
    weighted_captions: bool = option(
        False, "heed weights in captions: (more), [less], (much more:1.5); \\( is a bracket of the caption"
    )
