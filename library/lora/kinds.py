"""Kinds of networks besides plain LoRA, as other trainers' files hold them.

LoHa: Hyeon-Woo et al. 2021, arXiv:2108.06098. LoKr, and the names of both: Yeh et al. 2023, arXiv:2309.14859. DoRA: Liu
et al. 2024, arXiv:2402.09353. OFT: Qiu et al. 2023, arXiv:2306.07280. IA3: Liu et al. 2022, arXiv:2205.05638.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from library.errors import some
from library.lora.changes import Change, Factors, Full, LowRank, shared_scale

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined(Change):
    """`scale` times two matrices combined, each of which is a product of two itself."""

    first: Factors
    second: Factors
    scale: float

    def fits(self, shape: Sequence[int]) -> bool:
        """Files do not tell the shape of kernels, but for Tucker's."""
        return shape[0] == self.shape[0] and math.prod(shape) == math.prod(self.shape)

    @property
    def low_rank(self) -> bool:
        return self.first.rank * self.second.rank < min(self.shape[0], self._columns())

    def factors(self) -> Factors:
        if not self.low_rank:
            return super().factors()
        return shared_scale(self._product(), self.scale)

    def delta(self) -> Tensor:
        first, second = (side.up @ side.down for side in (self.first, self.second))
        return (self._combine(first, second) * self.scale).view(self.shape)

    def applied(self, weight: Tensor, ratio: float) -> Tensor:
        return weight.add(self.delta().view(weight.shape), alpha=ratio)

    def _columns(self) -> int:
        return self.first.down.shape[1]

    @abstractmethod
    def _combine(self, first: Tensor, second: Tensor) -> Tensor:
        """The matrix (out, in x kernel) that the two make."""

    @abstractmethod
    def _product(self) -> Factors:
        """The same as one product, whose rank is that of both sides multiplied."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoHa(Combined):
    """The product element by element; its factors are those of both sides by the row-wise Khatri-Rao product."""

    title: ClassVar[str] = "LoHa"

    def _combine(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second

    def _product(self) -> Factors:
        up = (self.first.up.unsqueeze(2) * self.second.up.unsqueeze(1)).flatten(1)
        return Factors(up, (self.first.down.unsqueeze(1) * self.second.down).flatten(0, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoKr(Combined):
    """The Kronecker product, whose factors are those of the sides."""

    title: ClassVar[str] = "LoKr"

    def _columns(self) -> int:
        return self.first.down.shape[1] * self.second.down.shape[1]

    def _combine(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.kron(first, second)

    def _product(self) -> Factors:
        return Factors(torch.kron(self.first.up, self.second.up), torch.kron(self.first.down, self.second.down))


class _Dependent(Change):
    """A change that depends on the weight. Its strength goes from the weight to the changed one in a straight line."""

    additive: ClassVar[bool] = False

    def delta(self) -> Tensor:
        raise TypeError(f"what a network of the kind {self.title} adds to a weight depends on the weight")

    def applied(self, weight: Tensor, ratio: float) -> Tensor:
        return torch.lerp(weight, self.changed(weight), ratio)

    @abstractmethod
    def changed(self, weight: Tensor) -> Tensor:
        """The weight at full strength."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposed(_Dependent):
    """A weight changed by `inner`, with norms of its own: `magnitude` is (out, 1, ...) or (1, in, ...)."""

    title: ClassVar[str] = "DoRA"
    inner: Change
    magnitude: Tensor

    @property
    def _axis(self) -> int:
        return 0 if len(self.magnitude) == self.magnitude.numel() else 1

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and shape[self._axis] == self.magnitude.numel()

    def changed(self, weight: Tensor) -> Tensor:
        direction = self.inner.applied(weight.clone(), 1.0)
        rest = [axis for axis in range(weight.dim()) if axis != self._axis]
        norm = torch.linalg.vector_norm(direction, dim=rest, keepdim=True)
        return direction * (self.magnitude.view(norm.shape) / (norm + _EPSILON))


@dataclass(frozen=True, kw_only=True, eq=False)
class OFT(_Dependent):
    """Blocks of outputs turned by the transpose of R = (I + Q) (I - Q)^-1, with Q = `blocks` - their transpose (count,
    size, size), whose norm is at most `limit`, unless that is 0; then every output times `rescale` (out, 1, ...).
    `shape` is (out,).
    """

    title: ClassVar[str] = "OFT"
    blocks: Tensor
    limit: float
    rescale: Tensor | None

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[0] == self.shape[0]

    def changed(self, weight: Tensor) -> Tensor:
        skew = self.blocks - self.blocks.mT
        norm = torch.linalg.vector_norm(skew) + 1e-8
        if 0 < self.limit < norm:
            skew = skew * (self.limit / norm)
        identity = torch.eye(skew.shape[-1])
        rotation = torch.linalg.solve(identity - skew, identity + skew, left=False)
        changed = (rotation.mT @ weight.reshape(*rotation.shape[:2], -1)).view(weight.shape)
        return changed if self.rescale is None else changed * self.rescale.view(-1, *(1,) * (weight.dim() - 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class IA3(_Dependent):
    """Each output, or each input with `on_input`, times 1 + `gains`. `shape` is (how many there are,)."""

    title: ClassVar[str] = "IA3"
    gains: Tensor
    on_input: bool

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[int(self.on_input)] == self.shape[0]

    def changed(self, weight: Tensor) -> Tensor:
        before, after = ((1,), weight.dim() - 2) if self.on_input else ((), weight.dim() - 1)
        return weight * (1 + self.gains.view(*before, -1, *(1,) * after))


# How the tensors of a layer are called, by the kind that they tell: what it needs, and what it may have besides.
_LORA = {"lora_up.weight", "lora_down.weight"}, {"lora_mid.weight"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}
_LOKR = set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
_OFT = {"oft_blocks"}, {"rescale"}
RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Those whose first dimension is the rank."""
_NOT_KNOWN = (("a1.weight", "GLoRA"), ("lambda_layer", "T-LoRA"), ("oft_blocks", "BOFT"), ("up_list.0", "DyLoRA"))


class UnknownParts(ValueError):
    """A layer's tensors are of no kind that is known. The text is the end of a sentence."""


def unusable_kind(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the kind that parts of these shapes tell, if it is one that is known by name alone."""
    if len(shapes.get("oft_blocks", ())) == 3:
        return None
    return next((kind for part, kind in _NOT_KNOWN if part in shapes), None)


def change_of(tensors: Mapping[str, Tensor], alpha: float) -> Change:
    """The change that the tensors of a layer tell, in float32. `alpha`: the number that its file has for it.

    UnknownParts if they are of no kind that is known, ValueError if they contradict each other.
    """
    rest = dict(tensors)
    magnitude, scalar = rest.pop("dora_scale", None), rest.pop("scalar", None)
    bias = rest.pop("diff_b", None) if "b_norm" not in rest else rest.pop("b_norm")
    factor = 1.0 if scalar is None else scalar.item()
    try:
        change = _change(rest, alpha, factor, bias)
    except (RuntimeError, IndexError):
        raise ValueError("by tensors whose shapes do not go together") from None
    if change is None:
        unknown = unusable_kind({part: tensor.shape for part, tensor in tensors.items()})
        raise UnknownParts(f"as a {unknown}" if unknown else f"by {some(sorted(tensors)) or 'alpha alone'}")
    if magnitude is None:
        return change
    if magnitude.dim() < 2:
        magnitude = magnitude.view(-1, 1)
    return Decomposed(shape=change.shape, inner=change, magnitude=magnitude, bias=bias)


def _change(parts: Mapping[str, Tensor], alpha: float, factor: float, bias: Tensor | None) -> Change | None:
    """`factor`: what the change is multiplied with besides."""
    names = parts.keys()
    if _are(names, _LORA):
        return _lora(parts, alpha, factor, bias)
    if _are(names, _LOHA):
        return _loha(parts, alpha, factor, bias)
    if names and _are(names, _LOKR):
        return _lokr(parts, alpha, factor, bias)
    if names in ({"diff"}, {"w_norm"}):
        (difference,) = parts.values()
        return Full(shape=tuple(difference.shape), difference=difference * factor, bias=bias)
    if _are(names, _OFT) and parts["oft_blocks"].dim() == 3:
        out = parts["oft_blocks"].shape[:2].numel()
        return OFT(shape=(out,), blocks=parts["oft_blocks"], limit=alpha * out, rescale=parts.get("rescale"), bias=bias)
    if names == {"weight", "on_input"}:
        gains = parts["weight"].flatten()
        return IA3(shape=(len(gains),), gains=gains, on_input=bool(parts["on_input"].item()), bias=bias)
    return None


def _are(names: set[str], kind: tuple[set[str], set[str]]) -> bool:
    needed, more = kind
    return needed <= names <= needed | more


def _lora(parts: Mapping[str, Tensor], alpha: float, factor: float, bias: Tensor | None) -> LowRank:
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    if "lora_mid.weight" in parts:
        down = torch.einsum("mn...,nj->mj...", parts["lora_mid.weight"], down.flatten(1))
    up = up if factor == 1 else up * factor
    up, flat = _pair(up.flatten(1), down.flatten(1))
    return LowRank(shape=(len(up), *down.shape[1:]), up=up, down=flat, alpha=alpha, bias=bias)


def _loha(parts: Mapping[str, Tensor], alpha: float, factor: float, bias: Tensor | None) -> LoHa:
    sides = [(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2)]
    (first, shape), (second, _) = (_side(*side) for side in sides)
    if first.up.shape[0] != second.up.shape[0] or first.down.shape[1] != second.down.shape[1]:
        raise ValueError("by a LoHa whose two halves have different sizes")
    return LoHa(shape=shape, first=first, second=second, scale=alpha / len(sides[0][1]) * factor, bias=bias)


def _lokr(parts: Mapping[str, Tensor], alpha: float, factor: float, bias: Tensor | None) -> LoKr | None:
    sides, ranks = [], []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append(_undivided(parts[side]))
        elif {f"{side}_a", f"{side}_b"} <= parts.keys():
            tucker = parts.get("lokr_t2") if side == "lokr_w2" else None
            sides.append(_side(parts[f"{side}_a"], parts[f"{side}_b"], tucker))
            ranks.append(len(parts[f"{side}_b"]))
        else:
            return None
    (first, small), (second, large) = sides
    shape = (small[0] * large[0], small[1] * large[1], *large[2:])
    # of two undivided matrices there is no rank, and whatever alpha is said to be has no effect
    scale = alpha / ranks[0] if ranks else 1.0
    return LoKr(shape=shape, first=first, second=second, scale=scale * factor, bias=bias)


def _side(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Factors, tuple[int, ...]]:
    """The product of a (out, rank) and b (rank, in, ...), or Tucker's of a (rank, out), b (rank, in) and a core (rank,
    rank, ...); and the shape of what it makes.
    """
    down = b if core is None else torch.einsum("ij...,jr->ir...", core, b)
    up = a.flatten(1) if core is None else a.mT.contiguous()
    return _pair(up, down.flatten(1)), (len(up), *down.shape[1:])


def _undivided(matrix: Tensor) -> tuple[Factors, tuple[int, ...]]:
    """As a product with the identity, on the smaller side."""
    flat, shape = matrix.flatten(1), tuple(matrix.shape)
    if flat.shape[0] < flat.shape[1]:
        return Factors(torch.eye(len(flat)), flat), shape
    return Factors(flat, torch.eye(flat.shape[1])), shape


def _pair(up: Tensor, down: Tensor) -> Factors:
    if up.shape[1] != len(down):
        raise ValueError(f"by matrices that do not go together, of ranks {up.shape[1]} and {len(down)}")
    return Factors(up, down)
