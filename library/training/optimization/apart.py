"""Optimizers that find their learning rate themselves, taught to move parts of a model at rates of their own.

D-Adaptation (https://arxiv.org/abs/2301.07733) and Prodigy (https://arxiv.org/abs/2306.06101) multiply the rate given
by an estimate d of how far the weights have to go. Their packages make one estimate for all groups of parameters,
refuse rates that differ, and some fail at a rate or a first gradient of 0.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

Group = dict[str, Any]
ALONE = "alone"
"""Of a group: it finds a rate of its own, although others have the same."""


@functools.cache
def by_rate(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class like `kind`, of the same name, groups and state, whose step moves the groups of each rate by themselves,
    so that these find a d of their own, as do those that are `alone` whatever their rate: what stops being trained
    would else be half in the sums that d is the ratio of. Groups with a rate of 0 stay as they are, and those without
    gradients.
    """

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> None:
        groups, plain = self.param_groups, kind.step
        if getattr(plain, "hooked", False):
            plain = plain.__wrapped__  # this step's hooks have been called
        failing = [ZeroDivisionError] if kind.__name__ == "DAdaptSGD" else []  # by a first gradient that is 0
        try:
            for part in _parts(groups):
                self.param_groups = part
                with contextlib.suppress(*failing):
                    plain(self)
        finally:
            self.param_groups = groups

    named = {"step": step, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), named)


def _parts(groups: list[Group]) -> list[list[Group]]:
    """The groups that move, those together whose rates are the same by the flags and after the scheduler, unless one
    is alone or they have found different d while they were not.
    """
    parts: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        if group["lr"] > 0 and any(parameter.grad is not None for parameter in group["params"]):
            key = (group.get(ALONE, False), group.get("initial_lr", group["lr"]), group["lr"], group["d"])
            parts.setdefault(key, []).append(group)
    return list(parts.values())
