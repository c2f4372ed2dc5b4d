"""A moving average of the trained weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Ema:
    """The exponential moving average of a module's trainable parameters, in float32 and on their devices.

    Make it when these are where they are trained. Buffers have no average: those of the module count. Averages of the
    iterates: Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; `average += (1 - d) * (weights - average)` with
    the warm-up `d = min(decay, (1 + n) / (10 + n))` after n updates is that of TensorFlow's
    `tf.train.ExponentialMovingAverage`, which Stable Diffusion was trained with. It makes the average span a ninth of
    the steps at the beginning, so that the first weights are forgotten.
    """

    def __init__(self, trained: nn.Module, decay: float):
        self.decay = decay
        self.count = 0
        named = [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.averages = [parameter.detach().to(torch.float32, copy=True) for parameter in self.parameters]
        pairs = list(zip(self.averages, self.parameters, strict=True))
        self._same_type = [pair for pair in pairs if pair[1].dtype == torch.float32]
        self._other_type = [pair for pair in pairs if pair[1].dtype != torch.float32]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are; called once after every optimizer step."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        if self._same_type:
            averages, parameters = zip(*self._same_type, strict=True)
            torch._foreach_lerp_(averages, parameters, weight)
        for average, parameter in self._other_type:  # one by one: each needs a float32 copy while it is taken in
            average.lerp_(parameter.float(), weight)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """While it lasts, the module holds the average; then its own weights again, bit for bit.

        Nothing is copied, except for parameters that are not float32: they get the average rounded to their type.
        """
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and the averages by the parameters' names."""
        return {"count": self.count, "averages": dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the averages are not of these parameters. The decay stays that of this object."""
        shapes = {name: average.shape for name, average in zip(self.names, self.averages, strict=True)}
        theirs = {name: average.shape for name, average in state["averages"].items()}
        if shapes != theirs:
            differing = sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
            raise ValueError(f"the averages are not of these parameters: {differing[0]} differs or is missing")
        self.count = state["count"]
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state["averages"][name])
