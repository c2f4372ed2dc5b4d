"""Group norms on the CPU."""

import torch
from torch import Tensor, nn


def keep_from_crashing(model: nn.Module, trained: nn.Module) -> None:
    """On the CPU torch 2.13's backward pass of a GroupNorm ends the process if its weights get gradients, and its input
    gets none and has its channels last. This looks after those of `model` whose weights are among what is `trained`, or
    in whose place something else computes, such as a network that trains a weight of its own.
    """
    moved = set(trained.parameters())
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm) and ("forward" in vars(norm) or not moved.isdisjoint(norm.parameters())):
            norm.register_forward_pre_hook(_in_order)


def _in_order(norm: nn.GroupNorm, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    (values,) = inputs
    if torch.is_grad_enabled() and not values.requires_grad:
        return (values.contiguous(),)
    return None
