"""The weights that are shown and saved, where they are others than those that are trained."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from library.training.methods.base import Method
from library.training.optimization.parts import in_float32

Published = Callable[[], contextlib.AbstractContextManager[None]]
"""Gives a context in which the trained tensors are those to show and save."""


@contextlib.contextmanager
def published_weights(method: Method, optimizer: torch.optim.Optimizer, trained: nn.Module) -> Iterator[None]:
    """While it lasts, `trained` holds the weights to show and save; then the trained ones again, bit for bit.

    They are the method's, and with a schedule-free optimizer (https://arxiv.org/abs/2405.15682) the average x rather
    than the point y where gradients are taken, which needs memory for a copy of the trained parameters.
    """
    with method.published_weights(), _averaged(optimizer, trained):
        yield


@contextlib.contextmanager
def _averaged(optimizer: torch.optim.Optimizer, trained: nn.Module) -> Iterator[None]:
    """A schedule-free optimizer's average; nothing changes with any other, or where it is there already."""
    if not any(group.get("train_mode") for group in optimizer.param_groups):
        yield
        return
    held = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    own = [parameter.detach().clone() for parameter in held]
    try:
        in_float32(optimizer, optimizer.eval)
        yield
    finally:
        in_float32(optimizer, optimizer.train)  # comes back to y up to rounding only
        with torch.no_grad():
            for parameter, data in zip(held, own, strict=True):
                parameter.copy_(data)
