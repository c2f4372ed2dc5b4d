"""A file of a whole model as large as the published one, with random weights, written tensor by tensor.

    python benchmarks/random_model.py --family sd1|sd2|sdxl [--float32] [--seed N] OUTPUT

The model itself is never built. The file is complete as the published ones are: position ids, tables of the noise
schedule (SD 1 and 2), the text layer that is not used (SD 2), CLIP's outputs that no module has.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import console

with console.quiet_dependencies():
    import torch
    from torch import Tensor

    from library.models.family import Family
    from library.models.files.checkpoint import LazyTensors, write_tensors
    from library.models.registry import FAMILIES
    from library.models.sgm_keys import CLIP_PREFIX, OPEN_CLIP_PREFIX, SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX

from tests.full_size import CONFIGS

_POOL = 4_194_301  # how many numbers weights are taken from: a prime, so that the rows of a tensor differ
_LAST_LAYER = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
_SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


class RandomWeights(LazyTensors):
    """A published file's names and shapes; weights are random numbers of `dtype` that depend on name and seed."""

    def __init__(self, family: type[Family], dtype: torch.dtype, seed: int = 0):
        with torch.device("meta"):
            model = family.from_configs(**CONFIGS[family.name])
            outlines = dict(model.tensors().outlines()) | _unused_weights(model)
            outlines = {name: outline.to(dtype) for name, outline in outlines.items()}
            self._outlines = outlines | _tables(family.name)
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._outlines)

    def __len__(self) -> int:
        return len(self._outlines)

    def __getitem__(self, key: str) -> Tensor:
        outline = self._outlines[key]
        if outline.dtype == torch.int64:
            return torch.arange(outline.numel()).reshape(outline.shape)
        start, count = crc32(key.encode()) % _POOL, outline.numel()
        turns = (start + count) // _POOL + 1
        numbers = self._pool.repeat(turns)[start : start + count] if turns > 1 else self._pool[start : start + count]
        return numbers.reshape(outline.shape).to(outline.dtype)

    def outlines(self) -> Mapping[str, Tensor]:
        return self._outlines


def _unused_weights(model: Family) -> dict[str, Tensor]:
    """What OpenCLIP's part of a published file has and no module."""
    if model.name == "sdxl":
        return {f"{SDXL_OPEN_CLIP_PREFIX}logit_scale": torch.empty(())}
    if model.name == "sd1":
        return {}
    layers, used = model.text_encoders[0].layers, model.tensors().outlines()
    last, unused = f"{_LAST_LAYER}{layers - 1}.", f"{_LAST_LAYER}{layers}."
    layer = {name.replace(last, unused): outline for name, outline in used.items() if name.startswith(last)}
    width = len(used[f"{OPEN_CLIP_PREFIX}ln_final.weight"])
    projection = {f"{OPEN_CLIP_PREFIX}text_projection": torch.empty(width, width)}
    return layer | projection | {f"{OPEN_CLIP_PREFIX}logit_scale": torch.empty(())}


def _tables(family: str) -> dict[str, Tensor]:
    """What is no weight and keeps its own number format."""
    clip = {"sd1": CLIP_PREFIX, "sdxl": SDXL_CLIP_PREFIX}.get(family)
    ids = {f"{clip}embeddings.position_ids": torch.empty((1, 77), dtype=torch.int64)} if clip else {}
    return ids if family == "sdxl" else ids | {name: torch.empty(1000) for name in _SCHEDULE}


def family_named(name: str) -> type[Family]:
    return next(family for family in FAMILIES if family.name == name)


def write_random_model(family: type[Family], output: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
    """Write the file; the same arguments give the same bytes."""
    write_tensors(output, RandomWeights(family, dtype, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description="A file as large as a published model, with random weights.")
    parser.add_argument("--family", choices=tuple(CONFIGS), required=True)
    parser.add_argument("--float32", action="store_true", help="in float32 instead of float16")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default 0)")
    parser.add_argument("output", type=Path, help=".safetensors or .ckpt")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.float32 else torch.float16
    write_random_model(family_named(arguments.family), arguments.output, dtype, arguments.seed)


if __name__ == "__main__":
    main()
