"""Which numbers are kept in which precision."""

from dataclasses import dataclass

import torch

from library.models.number_formats import NUMBER_FORMATS
from library.options.precision import PrecisionOptions
from library.options.saving import SaveOptions

MIXED = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The precisions of a run. Autocast computes in `frozen`."""

    mixed: str  # accelerate's name
    frozen: torch.dtype
    trained: torch.dtype
    vae: torch.dtype
    saved: torch.dtype


def choose(options: PrecisionOptions, saving: SaveOptions, mixed: str) -> Precision:
    """`mixed`: --mixed_precision, or what this machine replaces it with."""
    frozen = MIXED[mixed]
    return Precision(
        mixed=mixed,
        frozen=frozen,
        trained=frozen if options.full else torch.float32,
        vae=torch.float32 if options.no_half_vae else frozen,
        saved=NUMBER_FORMATS.get(saving.save_precision, frozen),
    )
