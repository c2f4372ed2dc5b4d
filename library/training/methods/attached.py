"""What a network does to the layers of a model, so that it can be undone for a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Forward = Callable[..., Any] | None
"""A layer's own, which it has in place of that of its class."""


class AttachedLayers:
    """Entered while a network is attached to layers below these roots, it knows them and how they were.

    Networks attach by giving layers another forward. Some take the layer's weights, too: those are not `restorable`.
    """

    def __init__(self, *roots: nn.Module):
        self._layers = [layer for root in roots for layer in root.modules()]
        self._changed: list[tuple[nn.Module, Forward, Forward]] = []
        self.restorable = False
        """Whether all that was done can be undone by putting back the forwards."""

    def __enter__(self) -> "AttachedLayers":
        self._before = [(layer, _own_forward(layer), _tensors(layer)) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        found = [
            (layer, before, _own_forward(layer), _tensors(layer) == tensors)
            for layer, before, tensors in self._before
            if _own_forward(layer) is not before
        ]
        self._changed = [(layer, before, now) for layer, before, now, whole in found if whole]
        self.restorable = bool(found) and len(self._changed) == len(found)
        self._layers.clear()
        self._before.clear()

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """While it lasts, the layers that have their weights compute as if nothing was attached to them."""
        try:
            for layer, before, _ in self._changed:
                _set_forward(layer, before)
            yield
        finally:
            for layer, _, now in self._changed:
                _set_forward(layer, now)


def _own_forward(layer: nn.Module) -> Forward:
    return vars(layer).get("forward")


def _set_forward(layer: nn.Module, forward: Forward) -> None:
    if forward is not None:
        layer.forward = forward
    else:
        vars(layer).pop("forward", None)


def _tensors(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters(recurse=False)}
