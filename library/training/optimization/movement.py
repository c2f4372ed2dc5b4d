"""Whether training moves what it should: a group without gradients is a run wasted, and nothing else would tell."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.training.device.engines import local
from library.training.methods.base import ParameterGroup
from library.training.optimization.parts import PLACE

_SAMPLED = 4096  # values watched of each parameter, spread evenly
_STEPS = 3  # a fresh LoRA's lower factor gets its first gradient in the second step
_PATIENCE = 30  # steps in which nothing at all may get a gradient: their images may be unreadable or of weight 0


class Movement:
    """Watches the gradients of the first optimizer steps, and how far the parameters have come since the start."""

    def __init__(
        self,
        groups: list[ParameterGroup],
        optimizer: torch.optim.Optimizer,
        *,
        resumed: bool = False,
        step: Callable[[], int] | None = None,
    ):
        """`resumed`: others have taken steps before, so that those left need not be any that can be taken. `step` gives
        the number of the one under way, for optimizers that take them in parts.
        """
        self.groups = groups
        self.resumed = resumed
        self.step = step or itertools.count().__next__
        self.last = -1  # step of which any group was seen
        self.seen = [-1] * len(groups)  # the same of each
        self.start = [[_sample(parameter) for parameter in group.parameters] for group in groups]
        self.taken = 0
        self.steps = [0] * len(groups)  # with a learning rate above 0
        self.largest: list[Tensor | float] = [0.0] * len(groups)
        self._hook = optimizer.register_step_pre_hook(self._observe)

    def _observe(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        step = self.step()
        self.taken += step != self.last
        self.last = step
        for i, group in enumerate(optimizer.param_groups):
            i = group.get(PLACE, i)
            if group["lr"] > 0 and self.groups[i].trained_in(step):
                self.steps[i] += step != self.seen[i]
                self.seen[i] = step
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        gradient = local(parameter.grad)
                        if gradient.numel():
                            self.largest[i] = gradient.abs().amax().clamp_min(self.largest[i])

    @property
    def observed(self) -> bool:
        """Whether every group that is to move has had the steps it takes to judge it, or can have no more."""
        counts = zip(self.groups, self.steps, strict=True)
        steps = min((n for group, n in counts if n >= _STEPS or (n and group.trained_in(self.last))), default=0)
        return steps >= _STEPS and (steps >= _PATIENCE or any(float(largest) != 0 for largest in self.largest))

    def check(self) -> None:
        """End watching. UserError naming groups whose gradients stayed zero although their learning rate did not; where
        chance decides that, while others got some, it may well be otherwise in further steps.
        """
        self._hook.remove()
        if not (self.taken or self.resumed):
            raise UserError(
                "no step could be taken, because all gradients overflowed: use --mixed_precision bf16, or "
                "--no_half_vae if the model's autoencoder overflows in half precision"
            )
        moves = any(float(largest) != 0 for largest in self.largest)
        watched = zip(self.groups, self.steps, self.largest, strict=True)
        still = [
            group.name
            for group, steps, largest in watched
            if steps >= _STEPS and float(largest) == 0 and not (group.by_chance and moves)
        ]
        if still:
            raise UserError(
                f"the parameters of {' and '.join(still)} get no gradient in the first {max(self.steps)} steps and "
                "would not be trained: set their learning rate to 0 if that is meant, or look at what the network is "
                "attached to"
            )

    def relative_changes(self) -> dict[str, float]:
        """|now - start| / |start| of each group, from the watched values; infinite if all were 0 and are not."""
        changes = {}
        for group, start in zip(self.groups, self.start, strict=True):
            now = torch.cat([_sample(parameter) for parameter in group.parameters])
            before = torch.cat(start)
            moved, size = float((now - before).norm()), float(before.norm())
            changes[group.name] = moved / size if size else math.inf if moved else 0.0
        return changes


def _sample(parameter: Tensor) -> Tensor:
    """Up to _SAMPLED values of a parameter, float32 on the CPU."""
    flat = local(parameter.detach()).flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().clone()
