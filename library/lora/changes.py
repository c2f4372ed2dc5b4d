"""What a network does to the layers of a model.

LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """Two matrices whose product is a flattened change of a weight: `up` (out, rank), `down` (rank, in x kernel)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, kw_only=True, eq=False)
class Change(ABC):
    """What a network does to one layer at full strength. `shape`: of the layer's weight, (out, in) or (out, in, height,
    width), as far as the file tells it: of some kinds (out, in x height x width), which `fits` knows; `bias`: what is
    added to its bias, (out,), if anything.
    """

    title: ClassVar[str]
    """Its kind, as in a sentence."""
    additive: ClassVar[bool] = True
    """Whether it adds the same to every weight, which `delta` is. Otherwise there is only `applied`."""
    shape: tuple[int, ...]
    bias: Tensor | None = None

    @property
    def low_rank(self) -> bool:
        """Whether there are `factors`."""
        return False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can be changed by it."""
        return tuple(shape) == self.shape

    def delta(self) -> Tensor:
        """What is added to the weight, of its `shape`. TypeError if that depends on the weight."""
        up, down = self.factors()
        return (up @ down).view(self.shape)

    def factors(self) -> Factors:
        """The same as a product of two matrices. TypeError if it is no product of small ones."""
        raise TypeError(f"{type(self).__name__} is no product of two small matrices")

    @abstractmethod
    def applied(self, weight: Tensor, ratio: float) -> Tensor:
        """`weight`, of the same shape and in float32, with the network at the strength `ratio`; may change `weight`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Change):
    """alpha / rank * up @ down, with `up` (out, rank) and `down` (rank, in x kernel)."""

    title: ClassVar[str] = "LoRA"
    up: Tensor
    down: Tensor
    alpha: float

    @property
    def low_rank(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self) -> Factors:
        """The scale is shared by both, so that neither of them becomes much larger than the other."""
        return shared_scale(Factors(self.up, self.down), self.scale)

    def applied(self, weight: Tensor, ratio: float) -> Tensor:
        return weight.flatten(1).addmm_(self.up, self.down, alpha=ratio * self.scale).view(weight.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Full(Change):
    """The difference itself: of a layer's weight, or of a norm's, (n,)."""

    difference: Tensor

    @property
    def title(self) -> str:
        return "full difference" if len(self.shape) > 1 else "norm"

    def delta(self) -> Tensor:
        return self.difference

    def applied(self, weight: Tensor, ratio: float) -> Tensor:
        return weight.add(self.difference.view(weight.shape), alpha=ratio)


def misfit(change: Change, weight: Sequence[int] | None, has_bias: bool) -> str | None:
    """Why a change cannot be made to a layer with a weight of this shape, None for none, as in brackets; None if it
    can.
    """
    if weight is None:
        return "without a weight in the model"
    if not change.fits(weight):
        found, own = (" x ".join(map(str, shape)) for shape in (change.shape, weight))
        return f"for a weight of {found}, not {own}"
    return "with a bias, which the model has not" if change.bias is not None and not has_bias else None


def misfit_of(change: Change, layer: nn.Module) -> str | None:
    """The same for a module."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return misfit(change, None if weight is None else weight.shape, bias is not None)


def change_layer(layer: nn.Module, changes: Sequence[tuple[Change, float]]) -> None:
    """Make changes to a layer, each so strongly, summed up in float32 and rounded once. Low-rank as they are: factors
    of several in a row are put beside each other, so that they are added in one go.
    """
    weight = layer.weight.detach().float()
    for low_rank, group in groupby(changes, key=lambda pair: isinstance(pair[0], LowRank)):
        if low_rank:
            scaled = ((change.up * (strength * change.alpha / change.rank), change.down) for change, strength in group)
            ups, downs = zip(*scaled, strict=True)
            up, down = (torch.cat(ups, dim=1).to(weight.device), torch.cat(downs).to(weight.device))
            weight = weight.flatten(1).addmm(up, down).view(weight.shape)
        else:
            for change, strength in group:
                weight = change.applied(weight.cpu(), strength).to(weight.device)
    layer.weight.copy_(weight)
    biases = [change.bias * strength for change, strength in changes if change.bias is not None]
    if biases:
        layer.bias.copy_(layer.bias.float() + sum(biases).to(layer.bias.device))


def shared_scale(factors: Factors, scale: float) -> Factors:
    """Factors of `scale` times their product."""
    root = math.sqrt(abs(scale))
    return Factors(factors.up * math.copysign(root, scale), factors.down * root)
