"""Trains a miniature model: pictures, autoencoder, then U-Net and text encoders with the own trainer.

`python examples/miniature/train.py --work_dir FOLDER` starts from nothing, takes about two hours on two CPU cores and
ends with `FOLDER/miniature.safetensors`. With `--family sdxl` it makes `FOLDER/miniature_sdxl.safetensors` out of the
finished miniature (another one with --start_from). Finished stages are taken over when it is started again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library import cli, console, options
from library.errors import UserError
from library.training import preflight

with console.quiet_dependencies():
    import torch
    from PIL import Image

    from examples.miniature import autoencoder
    from examples.miniature.configs import TRAINED
    from examples.miniature.evaluate import MODEL
    from examples.miniature.shapes import draw, random_scene
    from examples.miniature.warm_start import grown
    from examples.miniature.whole_model import WholeModel
    from library.models.registry import load_model
    from library.randomness import generator
    from library.training.base_model import Script
    from library.training.launch import launch

PICTURES = 16_000
WITHOUT_CAPTION = 0.1  # for classifier-free guidance
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
    model = TRAINED["sd1"].build()
    model.vae.load_state_dict(torch.load(vae_weights, weights_only=True))
    model.save(path, torch.float32)


def make_grown(path: Path, source: Path) -> None:
    """Writes an SDXL model file with what the finished miniature `source` can give it."""
    if not source.is_file():
        raise UserError(f"--start_from: {source} does not exist, name the finished miniature's file")
    torch.manual_seed(0)
    grown(load_model(source), TRAINED["sdxl"]).save(path, torch.float32)


def train(start: Path, name: str, script: Script, steps: int, rate: float, more: list[str]) -> None:
    """Trains U-Net and text encoders of `start` with the project's own trainer and saves the model beside it as `name`.

    `more` are flags of the training scripts.
    """
    work = start.parent
    prompts = work / "prompts.txt"
    prompts.write_text("".join(f"{prompt} --w 64 --h 64 --d 1 --l 4 --s 25\n" for prompt in PROMPTS))
    settings = cli.parse(
        options.TRAINING,
        [
            *("--pretrained_model_name_or_path", str(start)),
            *("--train_data_dir", str(work / "pictures"), "--resolution", "64", "--cache_latents"),
            *("--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "16"),
            *("--vae_batch_size", "32", "--train_batch_size", "32", "--max_train_steps", str(steps), "--seed", "1"),
            *("--learning_rate", str(rate), "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "200"),
            *("--output_dir", str(work), "--output_name", name, "--save_precision", "fp16"),
            *("--sample_prompts", str(prompts), "--sample_every_n_steps", "500", "--save_every_n_steps", "500"),
            *("--logging_dir", str(work / "logs"), "--max_data_loader_n_workers", "0", *more),
        ],
        description="",
    )
    if status := launch(settings, preflight.check(settings, trains_text_encoder=True), WholeModel(rate), script):
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--family", choices=tuple(TRAINED), default="sd1")
    parser.add_argument("--start_from", type=Path, default=MODEL, help="the finished miniature, for --family sdxl")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    known, more = parser.parse_known_args()
    console.setup(None)
    work, sdxl = known.work_dir, known.family == "sdxl"
    make_pictures(work / "pictures")
    start = work / ("grown.safetensors" if sdxl else "untrained.safetensors")
    if not start.is_file() and sdxl:
        make_grown(start, known.start_from)
    elif not start.is_file():
        if not (work / "vae.pt").is_file():
            autoencoder.train(work / "vae.pt")
        make_untrained(start, work / "vae.pt")
    script = Script(sdxl, f"train.py --family {'sd1' if sdxl else 'sdxl'}")
    train(start, "miniature_sdxl" if sdxl else "miniature", script, known.steps, known.learning_rate, more)


if __name__ == "__main__":
    cli.run(main)
