"""Caching ahead of training."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class CacheToolOptions:
    """What the scripts that cache ahead take besides the flags of training."""

    title: ClassVar[str] = "caching ahead"

    skip_existing: bool = option(False, "trust the files that are there without looking into them")
    sdxl: bool = option(False, "the model is an SDXL model; recognised without it, too")
    flux: bool = option(False, "the model is a FLUX model, which is not supported here")

    def __post_init__(self) -> None:
        if self.flux:
            raise UserError("--flux: FLUX models are not supported, give a Stable Diffusion 1.x, 2.x or SDXL model")
