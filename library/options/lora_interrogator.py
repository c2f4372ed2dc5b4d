"""Finding out which words networks react to."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class LoraInterrogatorOptions:
    """Which network is asked, and with which model."""

    title: ClassVar[str] = "interrogating networks"

    sd_model: str | None = option(
        None, "the model that the network is for: a file, a Diffusers folder, or owner/name on the hub", metavar="MODEL"
    )
    model: str | None = option(None, "the network, .safetensors or .ckpt", metavar="FILE")
    v2: bool = option(False, "the model is a Stable Diffusion 2.x model; which it is shows in it")
    batch_size: int = option(16, "words that are looked at together", metavar="N", minimum=1)
    clip_skip: int | None = option(
        None, "take the text encoder's answer from its Nth layer from the end; 1 is the last", metavar="N", minimum=1
    )

    def __post_init__(self) -> None:
        if self.sd_model is None:
            raise UserError("--sd_model: no model is given, give the one that the network is for")
        if self.model is None:
            raise UserError("--model: no network is given, give the file to interrogate")

    @property
    def network(self) -> Path:
        """The network's file."""
        return Path(self.model)
