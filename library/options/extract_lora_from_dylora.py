"""Extracting LoRAs from a DyLoRA."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class ExtractLoraFromDyloraOptions:
    """Which file is read, in which steps of the rank, and where the LoRAs go."""

    title: ClassVar[str] = "extracting LoRAs from a DyLoRA"

    unit: int | None = option(
        None, "step between the ranks; the unit of the training when left out", metavar="N", minimum=1
    )
    save_to: str | None = option(
        None,
        "files to write, .safetensors or .ckpt; the rank is put before the ending: name-0004.safetensors",
        metavar="FILE",
    )
    model: str | None = option(None, "file of the DyLoRA", metavar="FILE")

    def __post_init__(self) -> None:
        if self.model is None:
            raise UserError("--model: no file to read is named, give that of a network trained with networks.dylora")
        if self.save_to is None:
            raise UserError("--save_to: the files to write are not named, give a name ending in .safetensors or .ckpt")
