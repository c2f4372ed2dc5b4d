"""What is on the device in which phase."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Bring all parts of a module to the device, and each back to where it was afterwards."""
    parts = [(part, next(part.parameters()).device) for part in module.children()]
    module.to(device)
    try:
        yield
    finally:
        for part, home in parts:
            part.to(home)
