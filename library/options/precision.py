"""Number formats."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision of the computation and of the frozen parts."""

    title: ClassVar[str] = "precision"

    mixed_precision: str = option(
        "no",
        "number format of the computation; the trained weights stay in float32",
        metavar="FORMAT",
        choices=("no", "fp16", "bf16"),
    )
    no_half_vae: bool = option(False, "run the VAE in float32, for VAEs that overflow in fp16")
    fp8_base: bool = option(
        False,
        "keep the frozen weights of U-Net and text encoders in 8 bits (float8_e4m3fn), which halves their memory; "
        "computes in the format of --mixed_precision",
    )
    fp8_base_unet: bool = option(False, "the same for the U-Net alone")
