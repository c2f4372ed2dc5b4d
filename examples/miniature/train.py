"""Trains the miniature model from nothing: pictures, autoencoder, then U-Net and text encoder with the own trainer.

`python examples/miniature/train.py --work_dir FOLDER` takes about two hours on two CPU cores and ends with
`FOLDER/miniature.safetensors`. Finished stages are taken over when it is started again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


import torch
from PIL import Image

from examples.miniature import autoencoder
from examples.miniature.shapes import draw, random_scene
from examples.miniature.whole_model import WholeModel
from library import cli, console, options
from library.models.sd import StableDiffusion1
from library.randomness import generator
from library.training import preflight
from library.training.launch import launch

PICTURES = 16_000
WITHOUT_CAPTION = 0.1  # for classifier-free guidance
UNET = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
PROMPTS = (
    "a red circle on a white background",
    "a yellow star on a blue background",
    "a green cross on a purple background",
    "a black ring on a cyan background",
)


def make_pictures(folder: Path) -> None:
    """Writes the training pictures with their captions as `<folder>/1_shapes`."""
    target = folder / "1_shapes"
    if target.is_dir():
        return
    draft = target.with_suffix(".part")
    draft.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        rng = generator("miniature", number)
        scene = random_scene(rng)
        Image.fromarray(draw(scene)).save(draft / f"{number:05d}.png", compress_level=1)
        caption = "" if rng.random() < WITHOUT_CAPTION else scene.caption
        (draft / f"{number:05d}.caption").write_text(caption)
    draft.rename(target)


def make_untrained(path: Path, vae_weights: Path) -> None:
    """Writes a model file with the trained autoencoder and a fresh U-Net and text encoder."""
    torch.manual_seed(0)
    model = StableDiffusion1.from_configs(UNET, autoencoder.CONFIG, CLIP)
    model.vae.load_state_dict(torch.load(vae_weights, weights_only=True))
    model.save(path, torch.float32)


def train(work: Path, steps: int, rate: float, more: list[str]) -> None:
    """Trains U-Net and text encoder with the project's own trainer; `more` are flags of train_network.py."""
    prompts = work / "prompts.txt"
    prompts.write_text("".join(f"{prompt} --w 64 --h 64 --d 1 --l 4 --s 25\n" for prompt in PROMPTS))
    settings = cli.parse(
        options.TRAINING,
        [
            *("--pretrained_model_name_or_path", str(work / "untrained.safetensors")),
            *("--train_data_dir", str(work / "pictures"), "--resolution", "64", "--cache_latents"),
            *("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "16"),
            *("--vae_batch_size", "32", "--train_batch_size", "32", "--max_train_steps", str(steps), "--seed", "1"),
            *("--learning_rate", str(rate), "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "200"),
            *("--output_dir", str(work), "--output_name", "miniature", "--save_precision", "fp16"),
            *("--sample_prompts", str(prompts), "--sample_every_n_steps", "500", "--save_every_n_steps", "500"),
            *("--logging_dir", str(work / "logs"), "--max_data_loader_n_workers", "0", *more),
        ],
        description="",
    )
    launch(settings, preflight.check(settings), WholeModel(rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    known, more = parser.parse_known_args()
    console.setup(None)
    work = known.work_dir
    make_pictures(work / "pictures")
    if not (work / "vae.pt").is_file():
        autoencoder.train(work / "vae.pt")
    if not (work / "untrained.safetensors").is_file():
        make_untrained(work / "untrained.safetensors", work / "vae.pt")
    train(work, known.steps, known.learning_rate, more)


if __name__ == "__main__":
    cli.run(main)
