"""What becomes of the parts of the model that are not trained."""

from collections.abc import Iterable

from accelerate import Accelerator
from torch import nn

from library import console
from library.errors import UserError
from library.models import float8
from library.models.family import Family
from library.options.precision import PrecisionOptions
from library.training.device import engines
from library.training.methods.base import Method


def parts_in_8_bits(options: PrecisionOptions, method: Method, components: Iterable[str]) -> list[str]:
    """Which of `Family.components` are kept so: none where the U-Net itself is trained."""
    if method.is_trained("unet"):
        return []
    wanted = ("unet", "text_encoder") if options.fp8_base else ("unet",) if options.fp8_base_unet else ()
    return [name for name in components if wanted and name.startswith(wanted) and not method.is_trained(name)]


def check_8_bits(options: PrecisionOptions, method: Method, accelerator: Accelerator) -> None:
    """Say where --fp8_base has no effect. UserError where it cannot work."""
    flag = "--fp8_base" if options.fp8_base else "--fp8_base_unet" if options.fp8_base_unet else None
    if flag and method.is_trained("unet"):
        console.notice(f"{flag} has no effect: weights that are trained cannot be kept in 8 bits")
    elif flag and engines.spreads(accelerator):
        raise UserError(f"{flag}: FSDP and DeepSpeed cannot spread weights of 8 bits, leave one of them out")


def round_to_8_bits(options: PrecisionOptions, method: Method, model: Family) -> None:
    """Keep what is frozen in 8 bits, as the flags say. Comes before anything is attached to it."""
    components = model.components()
    for name in parts_in_8_bits(options, method, components):
        float8.store_in_8_bits(components[name].module)


def not_exchanged(step: nn.Module) -> None:
    """Have DDP leave these weights alone, whose format its processes cannot exchange; all have read the same file."""
    # DDP documents no public way
    step._ddp_params_and_buffers_to_ignore = float8.names_in_8_bits(step)
