"""Tiny models with the structure of each family, drawn pictures, and how trained files are compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.miniature import shapes
from library.models.family import Family
from library.models.registry import FAMILIES
from library.models.sgm_keys import OPEN_CLIP_PREFIX

UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


OPEN_CLIP = CLIP | {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 64}
UNET_V2 = UNET | {"attention_head_dim": (1, 1), "use_linear_projection": True}
SDXL = {
    "unet_config": UNET_V2
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 32 + 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 48,
    },
    "vae_config": VAE,
    "clip_config": CLIP | {"hidden_size": 32, "num_hidden_layers": 2},
    "open_clip_config": OPEN_CLIP | {"projection_dim": 48},
}
# Arguments of each family's `from_configs`. All are for sizes that are multiples of 4.
CONFIGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd1": {"unet_config": UNET, "vae_config": VAE, "clip_config": CLIP},
    "sd2": {"unet_config": UNET_V2, "vae_config": VAE, "clip_config": OPEN_CLIP},
    "sdxl": SDXL,
}


def make_model(family: str = "sd1", **changes: Mapping[str, Any]) -> Family:
    """Random weights, always the same, in evaluation mode. `changes` to the configurations have their names, as in
    `clip_config={"num_hidden_layers": 3}`. What published files hold besides is carried.
    """
    kind = next(kind for kind in FAMILIES if kind.name == family)
    configs = {name: {**config, **changes.get(name, {})} for name, config in CONFIGS[family].items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_configs(**configs).eval()
    if family == "sd2":
        model.carried = unused_text_layer(model) | {f"{OPEN_CLIP_PREFIX}logit_scale": torch.tensor(4.6)}
    return model


def unused_text_layer(model: Family) -> dict[str, torch.Tensor]:
    """What a file of Stable Diffusion 2.x has and the model does not: one text layer more."""
    layers = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
    last = model.text_encoders[0].layers - 1
    own = {name: tensor for name, tensor in model.tensors().items() if name.startswith(f"{layers}{last}.")}
    return {name.replace(f"{layers}{last}.", f"{layers}{last + 1}."): tensor + 1 for name, tensor in own.items()}


def save_model(path: Path, family: str = "sd1", **changes: Mapping[str, Any]) -> Path:
    """Write what `make_model` makes; returns the path."""
    make_model(family, **changes).save(path)
    return path


def draw_pictures(folder: Path, count: int, size: tuple[int, int] = (32, 32)) -> Path:
    """`count` drawn pictures with captions under `.txt`, always the same for a count; returns the folder."""
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene = shapes.random_scene(rng, size=size)
        Image.fromarray(shapes.draw(scene)).save(folder / f"{size[0]}_{number}.png")
        (folder / f"{size[0]}_{number}.txt").write_text(f"sks {scene.caption}", encoding="utf-8")
    return folder


def stored(path: Path) -> bytes:
    """The weights in a .safetensors file as they are stored: everything after its header, which has times in it."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def largest_difference(one: Path, other: Path) -> float:
    """Between any two weights of the same name."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return max((ours[key].float() - theirs[key].float()).abs().max().item() for key in ours)


def read_logs(logging_dir: Path, run: str = "*") -> EventAccumulator:
    """The TensorBoard log of a run that may have been resumed."""
    (folder,) = {file.parent for file in logging_dir.glob(f"{run}/*/events.*")}
    log = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    log.Reload()
    return log


def read_log(logging_dir: Path) -> EventAccumulator:
    """The one TensorBoard log below a --logging_dir."""
    (file,) = logging_dir.glob("*/network_train/events.*")
    log = EventAccumulator(str(file.parent), {"scalars": 0, "images": 0})  # 0: keep all
    log.Reload()
    return log


def scalars(log: EventAccumulator, tag: str) -> dict[int, float]:
    """A logged value by step."""
    return {event.step: event.value for event in log.Scalars(tag)}
