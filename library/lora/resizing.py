"""Networks of smaller ranks: each layer's change is replaced by the best approximation of its new rank.

That is the truncated singular value decomposition (Eckart and Young 1936).
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library import console
from library.bars import progress_bar
from library.errors import UserError
from library.lora.changes import Change, Factors, LowRank
from library.lora.decomposition import SVD, largest_svd, squared_norm, svd_of_product
from library.lora.kinds import Decomposed, LoKr
from library.lora.metadata import base_of, convolution_arguments, made_by, network_metadata, source
from library.lora.names import usual_shape
from library.lora.reading import ALPHA, NetworkFile, open_network
from library.lora.spellings import MAGNITUDE
from library.lora.threads import in_order
from library.lora.writing import lora_tensors, write_network
from library.models.family import Family
from library.models.files.checkpoint import hash_file, stores_metadata

TOOL = "networks/resize_lora.py"

_BIAS = "diff_b"

_ALPHAS = (2.0**-10, 2.0**15)
"""Beyond these the factors would be so small or so large that half precision loses digits."""


@dataclass(frozen=True)
class Choice:
    """Which rank a layer gets: at most `rank`, or `conv_rank` for convolutions larger than 1x1, and at least 1. With a
    `method` as small a one as its `param` allows; see `chosen_rank`.
    """

    rank: int
    conv_rank: int
    method: str | None = None
    param: float | None = None


def chosen_rank(values: Tensor, choice: Choice, limit: int, rest: float = 0.0) -> int:
    """The rank that falling singular values (n,) get, from 1 to `limit`; `rest`: the sum of the squares of those that
    are not among them, which sv_cumulative needs all of.

    sv_ratio: as many as are at least the largest one / param. sv_cumulative: the fewest whose sum is param of that of
    all. sv_fro: the fewest whose Frobenius norm is.
    """
    values = values.cpu().double()
    if not len(values) or values[0] == 0:
        return 1
    if choice.method is None:
        count = len(values)
    elif choice.method == "sv_ratio":
        count = int((values * choice.param >= values[0]).sum())
    else:
        power = 2 if choice.method == "sv_fro" else 1
        sums = values.pow(power).cumsum(0)
        count = int((sums < (sums[-1] + rest) * choice.param**power).sum()) + 1
    return max(min(count, limit, len(values)), 1)


class Resized(NamedTuple):
    """What has become of a layer. The shares kept are of the sum and of the Frobenius norm of the singular values, the
    former None where not all of these are known; `ratio` is the largest of them divided by the smallest one that is
    kept, None for a layer that stays as it was.
    """

    name: str
    tensors: Mapping[str, Tensor]
    is_conv: bool
    old_rank: int | None
    rank: int
    alpha: float
    sum_kept: float | None = 1.0
    norm_kept: float = 1.0
    ratio: float | None = None

    def told(self) -> str:
        """As a line of a list."""
        if self.ratio is None:
            return f"{self.name}: rank {self.rank}, alpha {self.alpha:g}, as it was"
        before = "full" if self.old_rank is None else self.old_rank
        total = "" if self.sum_kept is None else f"{self.sum_kept:.1%} of the sum and "
        return (
            f"{self.name}: rank {before} -> {self.rank}, alpha {self.alpha:g}, kept {total}{self.norm_kept:.1%} of the "
            f"Frobenius norm, largest / smallest kept {self.ratio:.1f}"
        )


@dataclass(frozen=True)
class Resizer:
    """Resizes layers of a network, which is for models of the family `base`, if that is known, on `device`, for a file
    in `dtype`.
    """

    choice: Choice
    dtype: torch.dtype
    device: torch.device
    base: type[Family] | None = None

    def __call__(self, item: tuple[str, Change]) -> Resized:
        """A layer of a smaller rank, by its name and change; one that is small enough already stays as it is."""
        name, change = item
        shape = usual_shape(name, change.shape, self.base)
        is_conv = math.prod(shape[2:]) > 1
        limit = self.choice.conv_rank if is_conv else self.choice.rank
        plain = isinstance(change, LowRank)
        old_rank = change.rank if plain else None
        if plain and self.choice.method is None and change.rank <= limit:
            tensors = self._tensors(name, Factors(change.up, change.down), change.scale, shape, as_it_was=True)
            return Resized(name, tensors, is_conv, old_rank, change.rank, tensors[f"{name}.{ALPHA}"].item())
        svd, rest = self._decomposed(change, limit)
        rank = chosen_rank(svd.s, self.choice, limit, rest)
        tensors = self._tensors(name, svd.truncated(rank), change.scale if plain else 1.0, shape)
        values = svd.s.cpu().double() * (change.scale != 0 if plain else 1)
        squares = values.square().cumsum(0)
        whole, smallest = squares[-1].item() + rest, values[rank - 1].item()
        return Resized(
            name,
            tensors,
            is_conv,
            old_rank,
            rank,
            tensors[f"{name}.{ALPHA}"].item(),
            None if rest else _share(values[:rank].sum().item(), values.sum().item()),
            math.sqrt(_share(squares[rank - 1].item(), whole)),
            values[0].item() / smallest if smallest else math.inf,
        )

    def _decomposed(self, change: Change, limit: int) -> tuple[SVD, float]:
        """Of a LoRA without its scale; at least the first `limit` singular values and their vectors, and the sum of the
        squares of the other values. Factors are decomposed in float64: the result is then as exact as the file it is
        saved in.
        """

        def prepared(factors: Factors) -> Factors:
            return Factors(*(factor.to(self.device, torch.float64) for factor in factors))

        if isinstance(change, LowRank):
            return svd_of_product(prepared(Factors(change.up, change.down))), 0.0
        if isinstance(change, LoKr):
            return svd_of_kronecker(prepared(change.first), prepared(change.second), change.scale, limit), 0.0
        if change.low_rank:
            return svd_of_product(prepared(change.factors())), 0.0
        matrix = change.delta().flatten(1).to(self.device)
        if self.choice.method == "sv_cumulative":
            return SVD(*torch.linalg.svd(matrix, full_matrices=False)), 0.0
        svd = largest_svd(matrix, limit)
        return svd, max(squared_norm(matrix) - svd.s.cpu().double().square().sum().item(), 0.0)

    def _tensors(
        self, name: str, factors: Factors, scale: float, shape: tuple[int, ...], *, as_it_was: bool = False
    ) -> dict[str, Tensor]:
        """scale * up @ down as a LoRA's tensors."""
        alpha = rank = float(len(factors.down))
        if _ALPHAS[0] <= abs(rank * scale) <= _ALPHAS[1]:
            alpha *= scale
        else:
            factors, as_it_was = Factors(factors.up * scale, factors.down), False
        rounded = Factors(*(factor.to("cpu", self.dtype) for factor in (factors if as_it_was else _balanced(factors))))
        return lora_tensors(name, rounded, shape, alpha)


def _share(part: float, whole: float) -> float:
    """Of nothing, all is kept; rounding may make a part larger than the whole."""
    return min(part / whole, 1.0) if whole else 1.0


def svd_of_kronecker(first: Factors, second: Factors, scale: float, limit: int) -> SVD:
    """The decomposition of scale * kron(first, second), which is that of both sides combined (Horn and Johnson 1991,
    Topics in Matrix Analysis, theorem 4.2.15): all singular values, the vectors of the first `limit`.
    """
    one, other = svd_of_product(first), svd_of_product(second)
    values, order = torch.outer(one.s, other.s).flatten().sort(descending=True, stable=True)
    left, right = order[:limit] // len(other.s), order[:limit] % len(other.s)
    u = torch.einsum("mk,nk->mnk", one.u[:, left], other.u[:, right]).flatten(0, 1)
    vh = torch.einsum("kp,kq->kpq", one.vh[left], other.vh[right]).flatten(1)
    return SVD(u * math.copysign(1, scale), values * abs(scale), vh)


def _balanced(factors: Factors) -> Factors:
    """The same product, whose factors have entries of about the same size: half precision has few small numbers. Powers
    of two round nothing.
    """
    largest = [factor.abs().max().item() for factor in factors]
    if not all(largest):
        return factors
    shift = 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)
    return Factors(factors.up * shift, factors.down / shift)


def resize_network(
    source: Path, target: Path, choice: Choice, dtype: torch.dtype | None, device: torch.device, verbose: bool = False
) -> None:
    """Write a network with smaller ranks to `target`, in `dtype` or as `source` is stored; tell what was kept.
    Magnitudes of DoRA, biases and norms are written as they are.

    UserError if `source` is no network, is damaged or has layers without a rank, or `target` cannot be written.
    """
    with open_network(source) as network:
        network.verify()
        base = base_of(network)
        resizer = Resizer(choice, dtype or _half_at_least(network.number_format()), device, base)
        matrices = [name for name in network.layers if _is_matrix(network.shapes(name))]
        if not matrices:
            raise UserError(f"{source} cannot be resized: it changes no weights, only biases and norms")
        done: list[Resized] = []
        with progress_bar(total=len(matrices), desc="resizing", unit="layer", delay=1, leave=False) as bar:
            for layer in in_order(resizer, _changes(network, matrices)):
                done.append(layer)
                bar.update()
        tensors = {key: tensor for layer in done for key, tensor in layer.tensors.items()}
        tensors |= _kept(network, matrices)
        write_network(target, tensors, resizer.dtype, _metadata(network, base, target, choice, done))
    if verbose:
        with console.long_list():
            print(*(layer.told() for layer in done), sep="\n")
    _tell(done)


def _half_at_least(dtype: torch.dtype) -> torch.dtype:
    """What numbers that are computed anew are stored in."""
    return dtype if dtype.itemsize > 1 else torch.float32


def _is_matrix(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(len(shape) > 1 for part, shape in shapes.items() if part not in ("", MAGNITUDE))


def _changes(network: NetworkFile, names: Sequence[str]) -> Iterator[tuple[str, Change]]:
    for name in names:
        change = network.change(name)
        inner = change.inner if isinstance(change, Decomposed) else change
        if not inner.additive:
            raise UserError(
                f"{network.path} cannot be resized: {inner.title}, by which it changes {name}, has no rank, resize "
                "LoRAs and their like"
            )
        yield name, inner


def _kept(network: NetworkFile, matrices: Sequence[str]) -> dict[str, Tensor]:
    """What has no rank, as it is."""
    of_matrices = dict.fromkeys(matrices, (MAGNITUDE, _BIAS))
    return {
        f"{name}.{part}".removesuffix("."): _as_ours(tensor, part, network.layers[name][part])
        for name, parts in network.layers.items()
        for part, tensor in network.tensors(name).items()
        if part in of_matrices.get(name, parts)
    }


def _as_ours(tensor: Tensor, part: str, key: str) -> Tensor:
    """As our own files have it: peft's magnitudes have shapes of their own."""
    return tensor.reshape(-1, 1) if part == MAGNITUDE and not key.endswith(MAGNITUDE) else tensor


def _metadata(
    network: NetworkFile, base: type[Family] | None, target: Path, choice: Choice, done: Sequence[Resized]
) -> dict[str, str]:
    """Empty where the file stores none."""
    if not stores_metadata(target):
        return {}
    linear, convolutions = ([layer for layer in done if layer.is_conv == kind] for kind in (False, True))
    first = linear or convolutions
    arguments = convolution_arguments([layer.rank for layer in convolutions], [layer.alpha for layer in convolutions])
    if any(MAGNITUDE in parts for parts in network.layers.values()):
        arguments["dora_wd"] = "True"
    what = f"{choice.method} {choice.param:g}, at most " if choice.method else ""
    note = f"resized to rank {what}{choice.rank}"
    fields = network_metadata(
        [network],
        base,
        target.stem,
        [layer.rank for layer in first],
        [layer.alpha for layer in first],
        made_by=made_by(TOOL, [source(network.path.name, hash_file(network.path))], **asdict(choice)),
        arguments=arguments,
    )
    said = network.metadata.get("ss_training_comment", "None")
    return fields | {"ss_training_comment": note if said in ("", "None") else f"{said}; {note}"}


def _tell(done: Sequence[Resized]) -> None:
    ranks = sorted({layer.rank for layer in done})
    kept = f"{_average([layer.norm_kept for layer in done])} of the Frobenius norm"
    sums = [layer.sum_kept for layer in done if layer.sum_kept is not None]
    if len(sums) == len(done):
        kept += f" and {_average(sums)} of the sum of the singular values"
    rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    console.notice(f"{len(done)} layers of rank {rank}, which keep {kept}")


def _average(shares: Sequence[float]) -> str:
    return f"{statistics.fmean(shares):.1%} (standard deviation {statistics.pstdev(shares):.1%})"
