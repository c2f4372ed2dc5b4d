"""Gradient checkpointing whose checkpoints wait for the backward pass in main memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.models.family import Family

_Packed = tuple[torch.device, Tensor]


def offload_checkpoints(model: Family) -> None:
    """Have a model's U-Net, and text encoders with gradient checkpointing on, keep checkpoints in main memory."""
    model.unet.enable_gradient_checkpointing(offloaded)
    for module in model.text_encoders.modules():
        if getattr(module, "gradient_checkpointing", False):
            if not hasattr(module, "_gradient_checkpointing_func"):  # transformers has no public way
                raise UserError(
                    "--cpu_offload_checkpointing does not know how the installed transformers checkpoints: drop it, or "
                    "train without the text encoder"
                )
            module._gradient_checkpointing_func = offloaded


def offloaded(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose activations are computed again in the backward pass from arguments kept in main
    memory.
    """
    with saved_tensors_hooks(_pack, _unpack):
        return checkpoint(function, *arguments, use_reentrant=False)


def _pack(tensor: Tensor) -> _Packed:
    """Nothing waits for the copy: whatever overwrites the tensor, or reads the copy, comes after it in its stream."""
    if isinstance(tensor, nn.Parameter):
        return tensor.device, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=tensor.is_cuda)
    return tensor.device, host


def _unpack(packed: _Packed) -> Tensor:
    device, tensor = packed
    return tensor if tensor.device == device else tensor.to(device, non_blocking=tensor.is_pinned())
