"""Number formats."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision of the computation and of the frozen parts."""

    title: ClassVar[str] = "precision"

    mixed_precision: str = option(
        "no",
        "number format of the computation; the trained weights stay in float32 without --full_bf16 or --full_fp16",
        metavar="FORMAT",
        choices=("no", "fp16", "bf16"),
    )
    full_fp16: bool = option(
        False, "keep the trained weights and their gradients in fp16, too; needs --mixed_precision fp16"
    )
    full_bf16: bool = option(
        False, "keep the trained weights and their gradients in bf16, too; needs --mixed_precision bf16"
    )
    no_half_vae: bool = option(False, "run the VAE in float32, for VAEs that overflow in fp16")
    fp8_base: bool = option(
        False,
        "keep the frozen weights of U-Net and text encoders in 8 bits (float8_e4m3fn), which halves their memory; "
        "computes in the format of --mixed_precision",
    )
    fp8_base_unet: bool = option(False, "the same for the U-Net alone")

    def __post_init__(self) -> None:
        if self.full_fp16 and self.full_bf16:
            raise UserError("--full_fp16, --full_bf16: weights have one format, drop one of them")
        for format in ("fp16", "bf16"):
            if self.full == f"--full_{format}" and self.mixed_precision != format:
                raise UserError(f"--full_{format} needs --mixed_precision {format}: add that, or drop --full_{format}")

    @property
    def full(self) -> str | None:
        """The flag that keeps the trained weights in half precision, if one does."""
        return "--full_fp16" if self.full_fp16 else "--full_bf16" if self.full_bf16 else None
