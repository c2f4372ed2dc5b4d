"""Which model is trained, and how it reads captions."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class ModelOptions:
    """The base model, and how its text encoders read captions."""

    title: ClassVar[str] = "model"

    pretrained_model_name_or_path: str | None = option(
        None,
        "the model to start from: a .safetensors or .ckpt file, a Diffusers folder, or owner/name on the hub",
        metavar="MODEL",
    )
    vae: str | None = option(
        None,
        "take the autoencoder from here: a file of one or of a complete model, a Diffusers folder, or owner/name",
        metavar="MODEL",
    )
    v2: bool = option(False, "the model is a Stable Diffusion 2.x model")
    v_parameterization: bool = option(False, "the model predicts v, not the noise, as the 768-pixel models of 2.x do")
    zero_terminal_snr: bool = option(False, "train on a noise schedule at whose end nothing of the image is left")
    tokenizer_cache_dir: str | None = option(
        None, "has no effect: the tokenizers come with this program", metavar="FOLDER"
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
