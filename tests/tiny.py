"""A tiny model with the structure of Stable Diffusion 1.x, drawn pictures, and how trained files are compared."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.miniature import shapes
from library.models.sd import StableDiffusion1

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


def save_model(path: Path) -> None:
    """Random weights, always the same; for sizes that are multiples of 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        StableDiffusion1.from_configs(UNET, VAE, CLIP).save(path)


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


def read_log(logging_dir: Path) -> EventAccumulator:
    """The one TensorBoard log below a --logging_dir."""
    (file,) = logging_dir.glob("*/network_train/events.*")
    log = EventAccumulator(str(file.parent), {"scalars": 0, "images": 0})  # 0: keep all
    log.Reload()
    return log


def scalars(log: EventAccumulator, tag: str) -> dict[int, float]:
    """A logged value by step."""
    return {event.step: event.value for event in log.Scalars(tag)}
