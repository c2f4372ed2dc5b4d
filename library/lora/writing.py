"""Files of networks that tools have made."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, some
from library.lora.changes import Factors
from library.lora.reading import ALPHA, DOWN, UP
from library.models.files.checkpoint import is_finite, stores_metadata, write_tensors
from library.models.files.weights_file import cast
from library.models.metadata import network_hashes


def lora_tensors(name: str, factors: Factors, shape: tuple[int, ...], alpha: float) -> dict[str, Tensor]:
    """A layer's tensors in a LoRA's file, for a weight of this `shape`; a convolution's kernel is that of `down`."""
    rank = len(factors.down)
    ones = (1,) * (len(shape) - 2)
    return {
        f"{name}.{UP}": factors.up.reshape(shape[0], rank, *ones).contiguous(),
        f"{name}.{DOWN}": factors.down.reshape(rank, *shape[1:]).contiguous(),
        f"{name}.{ALPHA}": torch.tensor(float(alpha)),
    }


def write_network(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write a network's file in `dtype`, with the hashes that web UIs know it by. UserError if it cannot be written, or
    would hold numbers that are not finite.
    """
    # an alpha that is rounded would change the strength of all of its layer
    stored = {name: cast(tensor, dtype) if tensor.dim() else tensor for name, tensor in tensors.items()}
    broken = sorted(name for name, tensor in stored.items() if not is_finite(tensor))
    if broken:
        rounded = all(map(is_finite, tensors.values()))
        remedy = (
            "use --save_precision float or bf16"
            if rounded
            else "look at the inputs with networks/check_lora_weights.py"
        )
        reason = f"too large for {str(dtype).removeprefix('torch.')}" if rounded else "too large to be computed"
        raise UserError(
            f"{path} is not written: {len(broken)} of its tensors would be {reason}, {some(broken)}: {remedy}"
        )
    if stores_metadata(path):
        metadata = {**metadata, **network_hashes(stored, None, metadata)}
    write_tensors(path, stored, None, metadata)
