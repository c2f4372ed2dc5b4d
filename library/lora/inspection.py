"""What a network's file holds, tensor by tensor."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from library import console
from library.lora.kinds import unusable_kind
from library.lora.metadata import base_of
from library.lora.names import part_title
from library.lora.reading import ALPHA, NetworkFile, open_network
from library.lora.spellings import MAGNITUDE
from library.lora.threads import in_order

_LISTED = 2  # different ranks that are listed one by one
# Part of a tensor's name -> the kind of network that it tells; the first that is found counts.
_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "on_input": "IA3",
    "lora_": "LoRA",
    "diff": "full difference",
    "_norm": "norm",
}


class Look(NamedTuple):
    """One tensor: `mean` is that of absolute values; all three are of its finite values, and nan without any."""

    name: str
    part: str
    key: str
    shape: tuple[int, ...]
    number_format: str
    is_matrix: bool
    mean: float
    low: float
    high: float
    broken: int
    """How many of its values are not finite."""

    def told(self) -> str:
        """As a line of a list."""
        size = "x".join(map(str, self.shape)) or "number"
        bad = f"  {self.broken} NOT FINITE" if self.broken else ""
        return f"{self.key}  {size}  mean |x| {self.mean:.3g}  {self.low:.3g} .. {self.high:.3g}{bad}"


def check_network(path: Path, show_all: bool) -> list[str]:
    """Print the tensors of a network, its matrices or with `show_all` every one, and then what it is; returns the names
    of those with values that are not finite. UserError if the file is missing, damaged or no network.
    """
    with open_network(path) as network:
        network.verify()
        looks = list(in_order(_look_at, _tensors(network)))
        with console.long_list():
            print(*(look.told() for look in looks if show_all or look.is_matrix or look.broken), sep="\n")
            print(*_summary(network, looks), sep="\n")
    return [look.key for look in looks if look.broken]


def _tensors(network: NetworkFile) -> Iterator[tuple[str, str, str, Tensor]]:
    for name, parts in network.layers.items():
        for part, tensor in network.tensors(name).items():
            yield name, part, parts[part], tensor


def _look_at(item: tuple[str, str, str, Tensor]) -> Look:
    name, part, key, tensor = item
    values = tensor.double()
    finite = values[values.isfinite()]
    low, high = (end.item() for end in finite.aminmax()) if len(finite) else (math.nan, math.nan)
    is_matrix = tensor.dim() > 1 and part != MAGNITUDE
    broken = tensor.numel() - len(finite)
    stored = str(tensor.dtype).removeprefix("torch.")
    return Look(name, part, key, tuple(tensor.shape), stored, is_matrix, finite.abs().mean().item(), low, high, broken)


def _summary(network: NetworkFile, looks: Sequence[Look]) -> Iterator[str]:
    base = base_of(network)
    version = network.metadata.get("ss_base_model_version")
    formats = Counter(look.number_format for look in looks)
    kinds = Counter(kind_of(network.shapes(name)) for name in network.layers)
    yield (
        f"{network.path.name}: {', '.join(kinds)} for {'a model that it does not name' if base is None else base.title}"
        + (f" ({version})" if version else "")
        + f", stored as {', '.join(formats)}"
    )
    for title, own in _by_part(looks).items():
        names = dict.fromkeys(look.name for look in own)
        ranks = Counter(rank for name in names if (rank := network.rank(name)) is not None)
        alphas = Counter(look.low for look in own if look.part == ALPHA)
        matrices = [look for look in own if look.is_matrix]
        values = sum(math.prod(look.shape) for look in matrices)
        mean = sum(look.mean * math.prod(look.shape) for look in matrices) / values if values else math.nan
        yield (
            f"{title}: {len(names)} layers, {len(own)} tensors, rank {_counted(ranks)}, alpha {_counted(alphas)}, "
            f"mean |x| {mean:.3g}"
        )


def kind_of(parts: Mapping[str, Sequence[int]]) -> str:
    """The kind of network that changes a layer, from the names and shapes of its tensors."""
    if "" in parts:
        return "no change of a layer"
    known = (kind for start, kind in _KINDS.items() if any(start in part for part in parts))
    kind = unusable_kind(parts) or next(known, "a kind that is not known")
    return f"DoRA of {kind}" if MAGNITUDE in parts else kind


def _by_part(looks: Sequence[Look]) -> dict[str, list[Look]]:
    parts: dict[str, list[Look]] = {}
    for look in looks:
        parts.setdefault(part_title(look.name), []).append(look)
    return parts


def _counted(values: Counter[float]) -> str:
    """The one value there is, or each with the number of layers that have it; of many the smallest and the largest."""
    if not values:
        return "none"
    if len(values) > _LISTED:
        return f"{min(values):g} to {max(values):g}"
    told = [f"{value:g} ({count})" for value, count in sorted(values.items())]
    return " and ".join(told) if len(told) > 1 else f"{min(values):g}"
