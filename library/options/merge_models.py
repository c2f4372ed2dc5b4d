"""Merging checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

_FORMATS = ("float", "fp16", "bf16")


@dataclass(frozen=True)
class MergeModelsOptions:
    """Which checkpoints are summed, with which weights, and where the sum goes."""

    title: ClassVar[str] = "merging models"

    models: tuple[Path, ...] | None = option(
        None, "checkpoints to merge, .safetensors or .ckpt in the original layout; the first decides", metavar="FILE"
    )
    output: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "file to write, .safetensors or .ckpt", metavar="FILE"
    )
    ratios: tuple[float, ...] | None = option(None, "weight of each model; equal shares when left out", metavar="RATIO")
    unet_only: bool = option(False, "merge only the U-Net, and take everything else from the first model")
    device: str = option("cpu", "where the sums are made: cpu, cuda, cuda:1, mps ...", metavar="DEVICE")
    precision: str = option("float", "number format of the sums", metavar="FORMAT", choices=_FORMATS)
    saving_precision: str | None = option(
        None, "number format of the result; that of the first model when left out", metavar="FORMAT", choices=_FORMATS
    )
    show_skipped: bool = option(False, "list the tensors that are kept from the first model for want of a counterpart")

    def __post_init__(self) -> None:
        if not self.models or len(self.models) < 2:
            number = "only one model is" if self.models else "no models are"
            raise UserError(f"--models: {number} given, give two or more files to merge")
        if self.output is None:
            raise UserError("--output: the file to write is not named, give a name ending in .safetensors or .ckpt")
        if self.ratios and len(self.ratios) != len(self.models):
            raise UserError(
                f"--ratios: {len(self.ratios)} for {len(self.models)} models, give one ratio for each model, in order"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each model."""
        return self.ratios or (1 / len(self.models),) * len(self.models)
