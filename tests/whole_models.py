"""How runs of scripts that train models themselves are compared."""

from pathlib import Path

import torch
from safetensors.torch import load_file

# AdamW moves every parameter that has a gradient. With a large epsilon, steps are nearly proportional to gradients, and
# runs that should agree can be compared.
EVERY_PARAMETER = {"learning_rate": 1e-3, "optimizer_args": "weight_decay=0"}
PROPORTIONAL = {"learning_rate": 0.1, "optimizer_args": ("eps=1", "weight_decay=0", "betas=0.,0."), "max_grad_norm": 0}
ROUNDING = 1e-6


def unchanged(base: Path, result: Path) -> set[str]:
    """The names of the tensors that are, bit for bit, what they were."""
    before, after = load_file(base), load_file(result)
    assert before.keys() == after.keys()
    return {name for name in before if torch.equal(before[name], after[name])}


def names(file: Path, *prefixes: str) -> set[str]:
    return {name for name in load_file(file) if name.startswith(prefixes)}
