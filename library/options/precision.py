"""Number formats and the memory they save."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision of the computation and of the frozen parts."""

    title: ClassVar[str] = "precision and memory"

    mixed_precision: str = option(
        "no",
        "number format of the computation; the trained weights stay in float32",
        metavar="FORMAT",
        choices=("no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them: slower, much less memory"
    )
    no_half_vae: bool = option(False, "run the VAE in float32, for VAEs that overflow in fp16")
