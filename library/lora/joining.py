"""Several LoRAs made into one: added element by element, set side by side, or approximated by one of a chosen rank."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library import console
from library.bars import progress_bar
from library.errors import UserError
from library.lora.block_weights import BlockWeights
from library.lora.changes import Factors, LowRank, shared_scale
from library.lora.decomposition import SVD, beside, largest_svd, squared_norm, svd_of_product
from library.lora.metadata import convolution_arguments, made_by, network_metadata
from library.lora.reading import NetworkFile
from library.lora.sources import LayerSum, Piece, Sources
from library.lora.threads import in_order
from library.lora.writing import lora_tensors, write_network
from library.models.family import Family
from library.models.files.checkpoint import stores_metadata
from library.models.registry import FAMILIES

MERGE_TOOL, SVD_TOOL = "networks/merge_lora.py", "networks/svd_merge_lora.py"

_ROUNDING = 1e-12  # share of squared norms that is nothing but the rounding of float32


class Product(NamedTuple):
    """What the new LoRA does to a layer: alpha / rank * up @ down. `kept` and `energy` are squared Frobenius norms, of
    this and of all that the files do, where it is an approximation.
    """

    factors: Factors
    alpha: float
    kept: float = 0
    energy: float = 0

    @property
    def rank(self) -> int:
        return len(self.factors.down)


class Joined(NamedTuple):
    """A layer of the new LoRA: its tensors as they lie in the file. Norms have no `product`."""

    tensors: dict[str, Tensor]
    spatial: bool
    product: Product | None


def join_networks(
    models: Sequence[Path],
    ratios: Sequence[float],
    save_to: Path,
    *,
    dtype: torch.dtype | None = None,
    concat: bool = False,
    shuffle: bool = False,
    lbws: Sequence[BlockWeights | None] = (),
    no_metadata: bool = False,
    family: str | None = None,
    tool: str = MERGE_TOOL,
) -> None:
    """Write one LoRA made of several to `save_to`, which is replaced only when the new file is whole; in `dtype`,
    float32 if that is None.

    Without `concat` the factors are added, so that the ranks must agree; two halves of the same LoRA are that LoRA.
    With it they are set side by side, and the new one does exactly what all do together, each `ratio` times. `shuffle`
    puts the ranks of every layer in an order that is drawn anew each time and kept nowhere, lest the LoRAs are cut out
    again; what the network does stays the same. `family` ("sd1", "sd2", "sdxl") is what they are for where none of
    them tells.

    UserError for networks for different families, for those that are no plain LoRAs or, without `concat`, have
    different ranks, and as from `open_network` and `write_network`.
    """

    def join(layer: LayerSum) -> Product:
        product = _side_by_side(layer) if concat else _added(layer)
        return _shuffled(product) if shuffle else product

    with ExitStack() as stack:
        sources = Sources(stack, models, ratios, lbws)
        base = sources.base or next((known for known in FAMILIES if known.name == family), None)
        made = partial(made_by, tool, concat=concat, shuffle=shuffle)
        _write(sources, join, save_to, dtype, base, made, no_metadata)


def svd_merge(
    models: Sequence[Path],
    ratios: Sequence[float],
    save_to: Path,
    *,
    rank: int,
    conv_rank: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    lbws: Sequence[BlockWeights | None] = (),
    no_metadata: bool = False,
) -> None:
    """Write the LoRA that comes nearest to the sum of several, each `ratio` times, to `save_to`; in `dtype`, float32 if
    that is None. Of `conv_rank` for convolutions that look at neighbours, and of `rank` for all other layers; less
    where a layer does not allow more, or the LoRAs together have no more. Decomposed on `device`.

    UserError as from `join_networks`, but that ranks and kinds may differ.
    """

    def join(layer: LayerSum) -> Product:
        return _nearest(layer, conv_rank if layer.spatial else rank, torch.device(device))

    with ExitStack() as stack:
        sources = Sources(stack, models, ratios, lbws)
        made = partial(made_by, SVD_TOOL, rank=rank, conv_rank=conv_rank)
        joined = _write(sources, join, save_to, dtype, sources.base, made, no_metadata)
    products = [one.product for one in joined if one.product is not None]
    if energy := sum(product.energy for product in products):
        kept = sum(product.kept for product in products)
        console.notice(f"{kept / energy:.2%} of the LoRAs' energy (sum of squared singular values) is kept")
    elif products:
        console.notice("nothing is left of the LoRAs: they cancel each other out, or do nothing")


def _write(
    sources: Sources,
    join: Callable[[LayerSum], Product],
    save_to: Path,
    dtype: torch.dtype | None,
    base: type[Family] | None,
    made: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    no_metadata: bool,
) -> list[Joined]:
    """`made`: what the new file says of how it was made, from what it says of the sources."""

    def join_layer(layer: LayerSum) -> Joined:
        product = None if layer.is_norm else join(layer)
        return Joined(_tensors(layer, product), layer.spatial, product)

    layers = progress_bar(
        sources.layers(), total=len(sources.names), desc="joining", unit="layer", delay=1, leave=False
    )
    joined = list(in_order(join_layer, layers))
    metadata = {}
    if stores_metadata(save_to):
        told = made([] if no_metadata else sources.told())
        metadata = _metadata(joined, sources.networks, base, save_to.stem, told, no_metadata)
    tensors = {key: tensor for one in joined for key, tensor in one.tensors.items()}
    write_network(save_to, tensors, dtype or torch.float32, metadata)
    _tell(sources, joined)
    return joined


def _tell(sources: Sources, joined: Sequence[Joined]) -> None:
    ranks = sorted({one.product.rank for one in joined if one.product is not None})
    told = f" of rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
    partly = len(sources.names) - sources.shared
    console.notice(f"{len(joined)} layers{told}" + (f", {partly} of them only in some of the files" if partly else ""))


def _tensors(layer: LayerSum, product: Product | None) -> dict[str, Tensor]:
    if product is None:
        tensors, bias_part = {f"{layer.name}.w_norm": layer.delta()}, "b_norm"
    else:
        tensors, bias_part = lora_tensors(layer.name, product.factors, layer.shape, product.alpha), "diff_b"
    bias = layer.bias()
    return tensors if bias is None else tensors | {f"{layer.name}.{bias_part}": bias}


def _added(layer: LayerSum) -> Product:
    """The factors' sums: the product of these, so each one's `up` times every other's `down` as well."""
    first, base = layer.pieces[0], _plain(layer, layer.pieces[0])
    up, down = torch.zeros_like(base.up), torch.zeros_like(base.down)
    for piece in layer.pieces:
        change = _plain(layer, piece)
        if change.rank != base.rank:
            raise UserError(
                f"{layer.name} has rank {base.rank} in {first.path} and {change.rank} in {piece.path}: add --concat, "
                f"or use {SVD_TOOL}"
            )
        if change.alpha != base.alpha and not change.alpha * base.alpha > 0:
            raise UserError(
                f"{layer.name} has alpha {base.alpha:g} in {first.path} and {change.alpha:g} in {piece.path}, between "
                "which factors cannot be scaled: add --concat"
            )
        scale = 1 if change.alpha == base.alpha else math.sqrt(change.alpha / base.alpha)
        up.add_(change.up, alpha=scale * abs(piece.strength))
        down.add_(change.down, alpha=scale * piece.strength)
    return Product(Factors(up, down), base.alpha)


def _plain(layer: LayerSum, piece: Piece) -> LowRank:
    if not isinstance(piece.change, LowRank):
        raise UserError(
            f"{piece.path} changes {layer.name} in another way than LoRA does ({piece.change.title}), without factors "
            f"that could be added: use {SVD_TOOL}"
        )
    return piece.change


def _side_by_side(layer: LayerSum) -> Product:
    """The exact sum, whose rank is that of all together."""
    for piece in layer.pieces:
        if not piece.change.low_rank:
            raise UserError(
                f"{piece.path} changes {layer.name} in another way than LoRA does ({piece.change.title}), which is no "
                f"product of two small factors: use {SVD_TOOL}"
            )
    factors = _factors(layer)
    return Product(factors, len(factors.down))


def _factors(layer: LayerSum) -> Factors:
    """Those of the sum of all, scaled so that their product is what is added to the weight."""
    return beside([shared_scale(piece.change.factors(), piece.strength) for piece in layer.pieces])


def _shuffled(product: Product) -> Product:
    up, down = product.factors
    # from the system's own source, lest the order is found again by trying out seeds
    order = random.SystemRandom().sample(range(product.rank), product.rank)
    return product._replace(factors=Factors(up[:, order], down[order]))


def _nearest(layer: LayerSum, rank: int, device: torch.device) -> Product:
    """The best approximation of the sum (Eckart and Young 1936); of what is no product, nearly: see `largest_svd`."""
    if all(piece.change.low_rank for piece in layer.pieces):
        product = Factors(*(factor.to(device) for factor in _factors(layer)))
        svd = svd_of_product(product)
        energy = _energy(svd)
        if energy <= _ROUNDING * squared_norm(product.up) * squared_norm(product.down):
            energy = 0.0  # they cancel each other out
    else:
        matrix = layer.delta().flatten(1).to(device)
        svd = largest_svd(matrix, rank)
        energy = squared_norm(matrix)
    up, down = (factor.to("cpu", copy=True) for factor in svd.truncated(rank))  # not a part of what may be large
    return Product(Factors(up, down), len(down), _energy(svd.first(rank)), energy)


def _energy(svd: SVD) -> float:
    return svd.s.cpu().double().square().sum().item()


def _metadata(
    joined: Sequence[Joined],
    networks: Sequence[NetworkFile],
    base: type[Family] | None,
    title: str,
    told: Mapping[str, Any],
    no_metadata: bool,
) -> dict[str, str]:
    """Ranks and alphas are those of linear layers; those of convolutions that look at neighbours are arguments."""
    flat, spatial = (
        [one.product for one in joined if one.product is not None and one.spatial == kind] for kind in (False, True)
    )
    main = flat or spatial
    return network_metadata(
        networks,
        base,
        title,
        [one.rank for one in main],
        [one.alpha for one in main],
        made_by=told,
        arguments=convolution_arguments([one.rank for one in spatial], [one.alpha for one in spatial]),
        no_metadata=no_metadata,
    )
