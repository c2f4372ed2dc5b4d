"""Tensors on their way to the device that computes."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; a GPU goes on with what it has in hand meanwhile, which a plain `.to` would wait for."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")
