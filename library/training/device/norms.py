"""Group norms on the CPU."""

from torch import Tensor, nn


def keep_from_crashing(module: nn.Module) -> None:
    """For models of which only a part is trained: on the CPU torch 2.13's backward pass of a GroupNorm ends the process
    if its weights get gradients, and its input gets none and has its channels last.
    """
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.register_forward_pre_hook(_in_order)


def _in_order(norm: nn.GroupNorm, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    (values,) = inputs
    if values.device.type == "cpu" and norm.weight.requires_grad and not values.requires_grad:
        return (values.contiguous(),)
    return None
