"""Writes an untrained model of a family: random weights, always the same for a seed, in a file of a few megabytes.

`python examples/miniature/untrained.py --family sdxl --output untrained.safetensors` makes a file with every kind of
tensor that published files of the family have. It loads, trains and merges as they do, and paints noise, at sizes that
are multiples of 16.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library import cli, console

with console.quiet_dependencies():
    import torch
    from torch import Tensor

    from examples.miniature.configs import UNTRAINED, Config, Structure
    from library.models.family import Family
    from library.models.noise import DDPM
    from library.models.number_formats import NUMBER_FORMATS
    from library.models.sgm_keys import (
        CLIP_PREFIX,
        OPEN_CLIP_PREFIX,
        SDXL_CLIP_PREFIX,
        SDXL_OPEN_CLIP_PREFIX,
        open_clip_key_map,
    )
    from library.models.text import TextEncoder

LOGIT_SCALE = math.log(100)  # where CLIP's training stops it


def untrained(family: str, seed: int = 0) -> Family:
    """A model of "sd1", "sd2" or "sdxl" in float32, in evaluation mode; torch's global generator stays as it was."""
    structure = UNTRAINED[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = structure.build().eval()
        model.carried = _unused(structure)
    return model


def _unused(structure: Structure) -> dict[str, Tensor]:
    """What published files of the family hold besides what is used."""
    positions = torch.arange(77)[None]
    scale = torch.tensor(LOGIT_SCALE)
    if structure.family == "sdxl":
        return {
            f"{SDXL_CLIP_PREFIX}embeddings.position_ids": positions,
            f"{SDXL_OPEN_CLIP_PREFIX}logit_scale": scale,
        }
    if structure.family == "sd1":
        return _schedule_tables() | {f"{CLIP_PREFIX}embeddings.position_ids": positions}
    (text,) = structure.text_encoders
    width = text["hidden_size"]
    return {
        **_schedule_tables(),
        **_text_layer(text),
        f"{OPEN_CLIP_PREFIX}logit_scale": scale,
        f"{OPEN_CLIP_PREFIX}text_projection": torch.randn(width, width) * width**-0.5,
    }


def _text_layer(config: Config) -> dict[str, Tensor]:
    """One text layer with weights of its own, named as the one behind those of `config`."""
    layer = TextEncoder({**config, "num_hidden_layers": 1}).clip.encoder.state_dict()
    layers = config["num_hidden_layers"]
    state = {f"encoder.{name.replace('layers.0.', f'layers.{layers}.')}": tensor for name, tensor in layer.items()}
    return {place.key: place.join(state) for place in open_clip_key_map(OPEN_CLIP_PREFIX, layers + 1).places(state)}


def _schedule_tables() -> dict[str, Tensor]:
    """The tables (1000,) that the original program stores: the schedule, and the posterior q(x[t-1] | x[t], x[0]) of
    Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 7.
    """
    betas = DDPM().betas.double()
    products = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    variance = betas * (1 - before) / (1 - products)
    tables = {
        "betas": betas,
        "alphas_cumprod": products,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": products.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - products).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - products).log(),
        "sqrt_recip_alphas_cumprod": products.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / products - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - products),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - products),
    }
    return {name: table.float() for name, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(UNTRAINED), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .safetensors or .ckpt file")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--save_precision", choices=tuple(NUMBER_FORMATS), default="fp16")
    options = parser.parse_args()
    console.setup(None)
    untrained(options.family, options.seed).save(options.output, NUMBER_FORMATS[options.save_precision])


if __name__ == "__main__":
    cli.run(main)
