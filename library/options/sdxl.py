"""What only the scripts for SDXL models take."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class SdxlOptions:
    """Flags of the SDXL scripts."""

    title: ClassVar[str] = "SDXL"

    disable_mmap_load_safetensors: bool = option(False, "has no effect: files are read without mapping them")
