"""LoRAs within a DyLoRA, whose first ranks are networks by themselves (Valipour et al. 2022, arXiv:2210.07558)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library import console
from library.errors import UserError, some
from library.lora.changes import Factors, LowRank
from library.lora.metadata import base_of, made_by, network_metadata, source
from library.lora.reading import ALPHA, DOWN, UP, NetworkFile, open_network
from library.lora.writing import lora_tensors, write_network
from library.models.files.checkpoint import hash_file, stores_metadata
from library.models.files.weights_file import cast
from library.tool_files import check_output

TOOL = "networks/extract_lora_from_dylora.py"

_MODULE = "networks.dylora"


def extract_ranks(path: Path, save_to: Path, unit: int | None) -> list[Path]:
    """Write a LoRA of each rank that is a multiple of `unit`, up to that of the DyLoRA at `path`, and return the files:
    `save_to` with the rank in four digits behind its stem. Each appears when it is whole. Without a `unit` it is that
    of the training.

    Weights keep their number format. UserError if it is no LoRA of one rank, `unit` does not divide that, or the file
    does not say what it was trained with.
    """
    with open_network(path) as network:
        network.verify()
        changes = {name: network.change(name) for name in network.layers}
        _require_lora(network)
        rank = _one_rank(path, changes)
        unit = unit or _unit_of_training(network)
        if rank % unit:
            raise UserError(f"--unit: {unit} does not divide {rank}, the rank of {path}: give the unit of its training")
        _check_training(network, unit)
        files = {
            of: save_to.with_name(f"{save_to.stem}-{of:04d}{save_to.suffix}") for of in range(unit, rank + 1, unit)
        }
        for file in files.values():
            check_output("--save_to", file, [path])
        told = source(path.name, hash_file(path)) if stores_metadata(save_to) else {}
        for of, file in files.items():
            _write(network, changes, of, file, told)
    return list(files.values())


def nested(change: LowRank, rank: int) -> LowRank:
    """What a layer of a DyLoRA does when its first ranks are used alone: alpha / all * sqrt(all / rank) * up @ down."""
    alpha = change.alpha * math.sqrt(rank / change.rank)
    return LowRank(shape=change.shape, up=change.up[:, :rank], down=change.down[:rank], alpha=alpha)


def _require_lora(network: NetworkFile) -> None:
    for name, parts in network.layers.items():
        if not {DOWN, UP} <= parts.keys() <= {DOWN, UP, ALPHA}:
            raise UserError(
                f"{network.path} is no DyLoRA: for {name} it has {some(sorted(parts))}, and only a LoRA's factors have "
                "ranks to choose"
            )


def _one_rank(path: Path, changes: Mapping[str, LowRank]) -> int:
    ranks = sorted({change.rank for change in changes.values()})
    if len(ranks) > 1:
        raise UserError(f"{path} is no DyLoRA: its layers have the ranks {', '.join(map(str, ranks))} and not one")
    return ranks[0]


def _check_training(network: NetworkFile, unit: int) -> None:
    """Say what the metadata tell against these ranks."""
    module = network.metadata.get("ss_network_module", _MODULE)
    if module != _MODULE:
        console.warn(
            f"{network.path} was trained by {module}, not by {_MODULE}: its first ranks are no networks by themselves"
        )
        return
    trained = _trained_unit(network)
    if trained and unit % trained:
        console.warn(
            f"{network.path} was trained with unit {trained}, so only multiples of {trained} were ranks by themselves: "
            f"give --unit {trained}"
        )


def _trained_unit(network: NetworkFile) -> int | None:
    """What the metadata say of it."""
    try:
        return int(json.loads(network.metadata.get("ss_network_args", "{}")).get("unit", 1))
    except (ValueError, TypeError, AttributeError):
        return None


def _unit_of_training(network: NetworkFile) -> int:
    """UserError if its metadata do not tell."""
    unit = _trained_unit(network) if network.metadata.get("ss_network_module") == _MODULE else None
    if not unit or unit < 0:
        raise UserError(
            f"--unit: {network.path} does not say what unit it was trained with, which is the step between the ranks: "
            "give it, 1 if the training had none"
        )
    console.notice(f"{network.path.name} was trained with unit {unit}, which is the step between the ranks")
    return unit


def _write(
    network: NetworkFile, changes: Mapping[str, LowRank], rank: int, file: Path, told: Mapping[str, str]
) -> None:
    """`told`: what the new file says of the old one, if it can."""
    kept = {name: nested(change, rank) for name, change in changes.items()}
    metadata = {}
    if told:
        metadata = network_metadata(
            [network],
            base_of(network),
            file.stem,
            {rank},
            {change.alpha for change in kept.values()},
            made_by=made_by(TOOL, [told], rank=rank),
        )
    write_network(file, _tensors(kept, network.number_format()), None, metadata)


def _tensors(changes: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a LoRA's file, the factors in `dtype`; alphas stay as exact as they are."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        factors = Factors(cast(change.up, dtype), cast(change.down, dtype))
        tensors |= lora_tensors(name, factors, change.shape, change.alpha)
    return tensors
