"""Steps of an optimizer for some of its parameters at a time, in float32 where they are kept in half precision."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.training.optimization.rounding import Rounding

HALF = (torch.bfloat16, torch.float16)
_VALUES = 2**24  # brought to float32 at a time: with gradients and what the optimizer computes, about 0.25 GB
PLACE = "place"
"""Tells hooks of a step in parts which of the optimizer's groups one is; groups have it as long as it lasts."""
_SPLITTABLE = ("torch.optim", "bitsandbytes", "schedulefree", "lion_pytorch", "transformers.optimization")


def can_be_split(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer treats every parameter by itself, as far as it is known: others find a rate from all of
    them, or look for a direction in the space of all.
    """
    known = any(kind.__module__ == name or kind.__module__.startswith(f"{name}.") for name in _SPLITTABLE)
    return known and not issubclass(kind, torch.optim.LBFGS)


class Parts:
    """One optimizer, whose steps are taken in parts. What it keeps afterwards is what it keeps of a whole step.

    Values of a group that count its steps, such as schedule-free ones have, are for every part what they were before
    the first one. Parameters in half precision are replaced by copies in float32 while the optimizer sees them: so what
    it keeps of them is float32, and their gradients are clipped and unscaled without being rounded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rounding: Rounding):
        self.optimizer = optimizer
        self.rounding = rounding
        groups = [group["params"] for group in optimizer.param_groups]
        self.group_of = {parameter: place for place, group in enumerate(groups) for parameter in group}
        self.numbers = {parameter: number for number, parameter in enumerate(self.group_of)}
        self.can_be_split = can_be_split(type(optimizer))
        self.before: dict[int, dict[str, Any]] = {}  # what groups that have taken part in this step were before it

    def divided(self) -> list[list[nn.Parameter]]:
        """All parameters, in parts that leave memory for the rest; one part if the optimizer cannot be split."""
        return divide(list(self.group_of), _VALUES if self.can_be_split else None)

    def take(self, parameters: Sequence[nn.Parameter], step: int, factor: Tensor | None = None) -> None:
        """Step those that have gradients, times `factor` (a scalar), and free these."""
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        if not parameters:
            return
        with self.alone(parameters, factor) as seen:
            self.optimizer.step()
        for parameter, stand_in in seen.items():
            if stand_in is not parameter:
                self.rounding(parameter.detach(), stand_in.detach(), step, self.numbers[parameter])
            parameter.grad = None

    def end(self) -> None:
        """To be called after a step's last part: it counts for groups without gradients, too."""
        self.complete(self.optimizer.step)

    def complete(self, change: Callable[[], Any]) -> None:
        """Let the optimizer do with groups that were in no part what it did with those that were."""
        left = [place for place in range(len(self.optimizer.param_groups)) if place not in self.before]
        if left:
            with self._showing(left):
                change()
        self.before.clear()

    @contextlib.contextmanager
    def alone(
        self, parameters: Sequence[nn.Parameter], factor: Tensor | None = None
    ) -> Iterator[Mapping[nn.Parameter, nn.Parameter]]:
        """While it lasts, the optimizer has these parameters alone. Gives what it sees of each, which takes over its
        gradient, times `factor`.
        """
        groups, state = self.optimizer.param_groups, self.optimizer.state
        seen = {parameter: _in_float32(parameter, factor) for parameter in parameters}
        places = {self.group_of[parameter] for parameter in parameters} if self.can_be_split else range(len(groups))
        with self._showing(sorted(places)):
            for parameter, stand_in in seen.items():
                groups[self.group_of[parameter]]["params"].append(stand_in)
                if parameter in state:
                    state[stand_in] = state.pop(parameter)
            try:
                yield seen
            finally:
                for parameter, stand_in in seen.items():
                    if stand_in in state:
                        state[parameter] = state.pop(stand_in)

    @contextlib.contextmanager
    def _showing(self, places: Sequence[int]) -> Iterator[None]:
        """While it lasts, the optimizer has these of its groups alone, as they were before the step, with nothing in
        them.
        """
        groups = self.optimizer.param_groups
        shown = [groups[place] for place in places]
        own = [group["params"] for group in shown]
        for place, group in zip(places, shown, strict=True):
            if place not in self.before:
                self.before[place] = {name: value for name, value in group.items() if name != "params"}
            group.update(self.before[place], params=[], **{PLACE: place})
        self.optimizer.param_groups = shown
        try:
            yield
        finally:
            self.optimizer.param_groups = groups
            for group, params in zip(shown, own, strict=True):
                group["params"] = params
                del group[PLACE]


def in_float32(optimizer: torch.optim.Optimizer, change: Callable[[], Any]) -> None:
    """Let an optimizer `change` its parameters in another way than by a step; half precision is rounded plainly."""
    parts = Parts(optimizer, Rounding(0))
    if not any(parameter.dtype in HALF for parameter in parts.group_of):
        change()
        return
    for part in parts.divided():
        with parts.alone(part) as seen, torch.no_grad():
            change()
            for parameter, stand_in in seen.items():
                parameter.copy_(stand_in)
    parts.complete(change)


def divide(parameters: Sequence[nn.Parameter], limit: float | None) -> list[list[nn.Parameter]]:
    """In their order, as few parts as it takes for each to have at most `limit` values, or one parameter."""
    parts: list[list[nn.Parameter]] = []
    filled = 0
    for parameter in parameters:
        if not parts or (limit is not None and filled + parameter.numel() > limit):
            parts.append([])
            filled = 0
        parts[-1].append(parameter)
        filled += parameter.numel()
    return parts


def _in_float32(parameter: nn.Parameter, factor: Tensor | None) -> nn.Parameter:
    """The parameter, or a copy of one in half precision, with its gradient times `factor`."""
    gradient = parameter.grad
    if parameter.dtype in HALF:
        parameter, whole = nn.Parameter(parameter.detach().float()), gradient
        parameter.grad = gradient = None if whole is None else whole.float()
    if factor is not None and gradient is not None:
        gradient.mul_(factor)
    return parameter
