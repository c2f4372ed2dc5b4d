"""Extracting a LoRA from the difference of two models."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

_FORMATS = ("float", "fp16", "bf16")


@dataclass(frozen=True)
class ExtractLoRAOptions:
    """Which two models are compared, and what LoRA is made of their difference."""

    title: ClassVar[str] = "extracting a LoRA"

    model_org: str | None = option(
        None, "model that the LoRA will be used with: a file, a folder, or owner/name on the hub", metavar="MODEL"
    )
    model_tuned: str | None = option(
        None, "model made from it, which the LoRA imitates: a file, a folder, or owner/name on the hub", metavar="MODEL"
    )
    save_to: str | None = option(None, "LoRA to write, .safetensors, .ckpt or .pt", metavar="FILE")
    v2: bool = option(False, "the models are Stable Diffusion 2.x")
    sdxl: bool = option(False, "the models are SDXL")
    v_parameterization: bool | None = option(None, "the models predict v, and the LoRA says so")
    dim: int = option(4, "rank of linear layers and 1x1 convolutions", metavar="NUMBER", minimum=1)
    conv_dim: int | None = option(
        None,
        "take the ResNet and sampling layers in, too, their 3x3 convolutions with this rank",
        metavar="NUMBER",
        minimum=1,
    )
    clamp_quantile: float = option(
        0.99, "clamp both factors of a layer at this quantile of their absolute values; 1 clamps nothing", minimum=0
    )
    min_diff: float = option(
        0.01, "leave a text encoder out none of whose weights differs by more than this", minimum=0
    )
    exact: bool = option(False, "full singular value decompositions, many times slower, for at most 1 % less error")
    load_precision: str | None = option(
        None, "round the models' weights to this number format first", metavar="FORMAT", choices=_FORMATS
    )
    save_precision: str | None = option(
        None, "number format of the LoRA; float when left out", metavar="FORMAT", choices=_FORMATS
    )
    device: str | None = option(None, "where differences are decomposed: cpu, cuda, cuda:1 ...", metavar="DEVICE")
    load_original_model_to: str | None = option(None, "has no effect: no model is loaded whole", metavar="DEVICE")
    load_tuned_model_to: str | None = option(None, "has no effect: no model is loaded whole", metavar="DEVICE")
    no_metadata: bool = option(False, "write nothing into the LoRA but what programs need to use it")

    def __post_init__(self) -> None:
        for flag in ("model_org", "model_tuned", "save_to"):
            if not getattr(self, flag):
                what = "the LoRA to write" if flag == "save_to" else "a model"
                raise UserError(f"--{flag}: {what} is not named, give --model_org, --model_tuned and --save_to")
        if self.v2 and self.sdxl:
            raise UserError("--v2 and --sdxl: a model cannot be both, leave one out")
        if self.clamp_quantile > 1:
            raise UserError(f"--clamp_quantile: {self.clamp_quantile:g} is no quantile, give 0 to 1; 1 clamps nothing")
