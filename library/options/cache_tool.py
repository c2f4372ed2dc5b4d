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
    sdxl: bool = option(False, "the model is an SDXL model, which is not supported here")
    flux: bool = option(False, "the model is a FLUX model, which is not supported here")

    def __post_init__(self) -> None:
        for name, title in (("sdxl", "SDXL"), ("flux", "FLUX")):
            if getattr(self, name):
                raise UserError(f"--{name}: {title} models are not supported here: give a Stable Diffusion 1.x model")
