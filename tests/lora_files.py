"""Files of LoRAs with random weights, and what they come to."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONTEXT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
POINTWISE = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {LINEAR: (24, 20), CONTEXT: (24, 30), POINTWISE: (24, 18, 1, 1), CONV: (16, 10, 3, 3), TEXT: (28, 22)}
SD1 = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}


def lora_tensors(seed: int, rank: int, alpha: float | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random factors; without alphas if that is None."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, *rest) in shapes.items():
        ones = (1,) * (len(rest) - 1)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *ones, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def write_lora(
    path: Path,
    seed: int = 0,
    rank: int = 4,
    alpha: float | None = 2,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    metadata: Mapping[str, str] = SD1,
    **more: Tensor,
) -> Path:
    """A file of them, with `more` tensors of a name each, whose dots are written __."""
    own = {key.replace("__", "."): tensor for key, tensor in more.items()}
    save_file(lora_tensors(seed, rank, alpha, shapes) | own, path, dict(metadata))
    return path


def products(path: Path) -> dict[str, Tensor]:
    """alpha / rank * up @ down of each layer, flattened, in float64."""
    tensors = load_file(path)
    found = {}
    for key, up in tensors.items():
        name, _, part = key.partition(".")
        if part == "lora_up.weight":
            down = tensors[f"{name}.lora_down.weight"].double().flatten(1)
            alpha = tensors.get(f"{name}.alpha", torch.tensor(len(down)))
            found[name] = alpha.double() / len(down) * up.double().flatten(1) @ down
    return found


def sum_of(paths: list[Path], ratios: list[float]) -> dict[str, Tensor]:
    """The same of several, each `ratio` times."""
    total: dict[str, Tensor] = {}
    for path, ratio in zip(paths, ratios, strict=True):
        for name, product in products(path).items():
            total[name] = total.get(name, 0) + ratio * product
    return total
