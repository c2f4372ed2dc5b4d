"""Optimizers on a problem of a few weights, for tests of what they do and keep."""

import torch
from torch import nn

from library.options.optimizer import OPTIMIZERS, OptimizerOptions
from library.training.methods.base import ParameterGroup
from library.training.optimization.optimizers import make_optimizer

MODULES = ("torch.optim.RMSprop", "bitsandbytes.optim.lamb.LAMB")
"""Optimizers of no row."""


def options(name: str, *arguments: str, **more: object) -> OptimizerOptions:
    """With a rate at which a few steps show."""
    rate, adapts = 0.01, name in OPTIMIZERS and OPTIMIZERS[name].adapts_rate
    if adapts:
        rate, arguments = 1.0, arguments if name == "Prodigy" else (*arguments, "d0=0.01")
    return OptimizerOptions(optimizer_type=name, optimizer_args=arguments, **{"learning_rate": rate} | more)


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One above the 4096 values from which bitsandbytes takes 8 bits, one below, one of zeros."""
    torch.manual_seed(0)
    shapes = ((64, 80), (7,), (3, 4))
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    nn.init.zeros_(made[2])
    return made


def optimizer_of(
    parameters: list[nn.Parameter], chosen: OptimizerOptions, rates: tuple[float, float] | None = None
) -> torch.optim.Optimizer:
    """Over two groups, the first of which has one parameter, with rates of their own if they are given."""
    first, rest = rates or (chosen.learning_rate, chosen.learning_rate)
    groups = [ParameterGroup("first", parameters[:1], first), ParameterGroup("rest", parameters[1:], rest)]
    return make_optimizer(chosen, groups)


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """A quadratic whose minimum is elsewhere in each step."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            target = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (parameter.detach().float() - 2 - target).to(parameter.dtype)
        optimizer.step()


def leaves(value: object) -> list[object]:
    """All that a state holds, tensors with their types and bits."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in (key, *leaves(value[key]))]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves(one)]
    return [value.dtype, value.double().tolist()] if isinstance(value, torch.Tensor) else [type(value), value]
