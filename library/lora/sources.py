"""The files of networks that become one: opened, compared, and read layer by layer."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library import console
from library.errors import UserError, some
from library.lora.block_weights import BlockWeights, counts_of_lists
from library.lora.changes import Change
from library.lora.metadata import common_base, source
from library.lora.names import usual_shape
from library.lora.reading import open_network
from library.models.files.checkpoint import hash_file


class Addition(NamedTuple):
    """A network's file that counts `ratio` times, and that times what `blocks` say of a layer's block."""

    path: Path
    ratio: float
    blocks: BlockWeights | None = None

    def strength(self, name: str) -> float:
        """How strongly it counts in this layer."""
        return self.ratio * (1.0 if self.blocks is None else self.blocks.of(name))

    def told(self) -> dict[str, Any]:
        """What the new file says of it. Reads all of it."""
        blocks = {} if self.blocks is None else {"lbw": self.blocks.values}
        return source(self.path.name, hash_file(self.path), ratio=self.ratio, **blocks)


class Piece(NamedTuple):
    """What one of the files does to a layer, and how strongly it counts there."""

    path: Path
    change: Change
    strength: float


class LayerSum(NamedTuple):
    """What the files together do to one layer. `shape`: of its weight."""

    name: str
    pieces: list[Piece]
    shape: tuple[int, ...]

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1

    @property
    def spatial(self) -> bool:
        """Whether it is a convolution that looks at neighbours; others are like linear layers."""
        return math.prod(self.shape[2:]) > 1

    def bias(self) -> Tensor | None:
        """What all of them together add to its bias, (out,), if anything."""
        parts = [piece.change.bias * piece.strength for piece in self.pieces if piece.change.bias is not None]
        return torch.stack(parts).sum(0) if parts else None

    def delta(self) -> Tensor:
        """What all of them together add to its weight, of its `shape`."""
        return sum(piece.change.delta().view(self.shape) * piece.strength for piece in self.pieces)


class Sources:
    """The files of networks that become one, closed by `stack`. UserError if one of them is damaged, or if they are for
    different families of models.

    `base`: the family, None if none of them tells. `names`: of all layers; `shared`: how many of them all files have.
    """

    def __init__(
        self,
        stack: ExitStack,
        models: Sequence[Path],
        ratios: Sequence[float],
        lbws: Sequence[BlockWeights | None],
    ):
        self.networks = [stack.enter_context(open_network(path)) for path in models]
        if repeated := [str(path) for path, count in Counter(map(Path.resolve, models)).items() if count > 1]:
            console.notice(f"{some(repeated)} is among the networks more than once, and counts each time")
        self._additions = [Addition(*of) for of in zip(models, ratios, lbws or [None] * len(models), strict=True)]
        self.base = common_base(self.networks)
        for path, _, blocks in self._additions:
            if blocks is not None and self.base is not None and blocks.sdxl != (self.base.name == "sdxl"):
                raise UserError(
                    f"--lbws: {len(blocks.values)} weights are no list for {path}, which is for {self.base.title}: "
                    f"give {counts_of_lists(self.base.name == 'sdxl')}"
                )
        for network in self.networks:
            network.verify()
        self.names = list(dict.fromkeys(name for network in self.networks for name in network.layers))
        self.shared = sum(all(name in network.layers for network in self.networks) for name in self.names)

    def layers(self) -> Iterator[LayerSum]:
        """All of them, each read when it is its turn. UserError for those that cannot be summed."""
        for name in self.names:
            pieces = [
                Piece(network.path, network.change(name), addition.strength(name))
                for network, addition in zip(self.networks, self._additions, strict=True)
                if name in network.layers
            ]
            _check(name, pieces)
            shape = max((piece.change.shape for piece in pieces), key=len)
            yield LayerSum(name, pieces, usual_shape(name, shape, self.base))

    def told(self) -> list[dict[str, Any]]:
        """What the new file says of them. Reads all of them."""
        return [addition.told() for addition in self._additions]


def _check(name: str, pieces: Sequence[Piece]) -> None:
    first = pieces[0]
    for path, change, _ in pieces:
        if not change.additive:
            raise UserError(
                f"{path} changes {name} in a way that depends on the model's own weights ({change.title}): merge it "
                "into a model with networks/merge_lora.py --sd_model, and make a LoRA of that with "
                "networks/extract_lora_from_models.py"
            )
        if not _alike(first.change.shape, change.shape):
            raise UserError(
                f"{name} is {_sizes(first.change.shape)} in {first.path} and {_sizes(change.shape)} in {path}: only "
                "networks for models of one structure go together"
            )


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether these can be shapes of one weight: some files have convolutions flattened from the second dimension."""
    flat = one[:1] == other[:1] and math.prod(one) == math.prod(other)
    return flat and (len(one) != len(other) or one == other)


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
