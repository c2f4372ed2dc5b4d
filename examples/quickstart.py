"""Teaches a miniature model a shape it does not know, and shows what it painted before and after.

Draws 12 pictures of a heart that is called "sks", trains a LoRA on them with train_network.py (with --sdxl on the SDXL
miniature, with sdxl_train_network.py), measures the LoRA on pictures that it has not seen, and writes everything to
output/quickstart.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from examples.miniature.evaluate import MODEL, SAMPLER, SCALE, SDXL_MODEL, STEPS
from examples.miniature.shapes import COLOURS, Scene, draw, heart
from examples.sheet import contact_sheet
from library import cli, console
from library.errors import UserError
from library.randomness import generator
from library.training.preflight import make_writable

ROOT = Path(__file__).resolve().parents[1]
WORD = "sks"
PICTURES, HELD_OUT = 12, 8
PROMPTS = (
    "a red sks on a white background",
    "a blue sks on a yellow background",
    "a purple sks on a black background",
    "a white sks on a green background",
    "a yellow sks on a purple background",
    "a cyan sks on a red background",
)
TIMESTEPS = range(50, 1000, 100)


class Base(NamedTuple):
    """A miniature, and the script that trains networks for it."""

    model: Path
    script: Path


SD1, SDXL = Base(MODEL, ROOT / "train_network.py"), Base(SDXL_MODEL, ROOT / "sdxl_train_network.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "quickstart")
    parser.add_argument("--sdxl", action="store_true", help="teach the SDXL miniature instead")
    arguments = parser.parse_args()
    folder, base = shortest(arguments.output_dir), SDXL if arguments.sdxl else SD1
    console.setup(None)
    if not base.model.is_file():
        raise UserError(f"the miniature model {base.model} is missing: get it with git, or train it as its README says")

    make_writable("--output_dir", str(folder))
    print(f'Drawing {PICTURES} pictures of "{WORD}" and {HELD_OUT} to measure with, in {folder}')
    draw_pictures(folder / "pictures" / f"10_{WORD}", range(PICTURES))
    draw_pictures(folder / "held_out" / f"1_{WORD}", range(PICTURES, PICTURES + HELD_OUT))

    command = training_command(base, folder)
    print("Training the LoRA:", show(command), sep="\n\n", end="\n\n", flush=True)
    if subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command[2:]]).returncode:
        raise UserError("training failed, see the message above")
    report(base, folder)


def draw_pictures(folder: Path, numbers: range) -> None:
    """Hearts in different colours, sizes and places, each with a caption file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(hearts(numbers.stop)):
        if number in numbers:
            picture = Image.fromarray(draw(scene, heart))
            picture.save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.caption").write_text(scene.caption)


def hearts(count: int) -> list[Scene]:
    """Scenes of the new shape, large and near the middle, no two with the same pair of colours."""
    scenes: dict[tuple[str, str], Scene] = {}
    rng = generator("quickstart")
    while len(scenes) < count:
        colour, background = (str(name) for name in rng.choice(list(COLOURS), size=2, replace=False))
        centre = tuple(rng.uniform(-0.02, 0.02, size=2).tolist())
        scene = Scene(WORD, colour, background, radius=float(rng.uniform(0.35, 0.38)), centre=centre)
        scenes.setdefault((colour, background), scene)
    return list(scenes.values())


def training_command(base: Base, folder: Path) -> list[str]:
    """The command line of the training, as a user would type it."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt} --w 64 --h 64 --d 1 --l {SCALE} --s {STEPS}\n" for prompt in PROMPTS[:2]))
    return [
        *("accelerate", "launch", "--num_cpu_threads_per_process=2", str(shortest(base.script))),
        f"--pretrained_model_name_or_path={shortest(base.model)}",
        f"--train_data_dir={folder / 'pictures'}",
        *("--resolution=64", "--cache_latents", "--train_batch_size=4"),
        *("--network_module=networks.lora", "--network_dim=16", "--network_alpha=16"),
        *("--learning_rate=5e-4", "--max_train_steps=1000", "--seed=1"),
        *(f"--output_dir={folder}", f"--output_name={WORD}", f"--logging_dir={folder / 'logs'}"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=250", "--max_data_loader_n_workers=1"),
    ]


def report(base: Base, folder: Path) -> None:
    """Measures and paints with the model alone and with the LoRA."""
    with console.quiet_dependencies():
        import torch

        from library.generation.paint import paint
        from library.generation.prompts import PromptLine
        from library.models.registry import load_model
        from networks.lora import create_network_from_weights
    model = load_model(base.model)
    points = model.attach_points()
    lora = folder / f"{WORD}.safetensors"
    network, weights = create_network_from_weights(1.0, lora, model.vae, points.text_encoders, points.unet)
    network.apply_to(points.text_encoders, points.unet)
    network.load_state_dict(weights)

    losses = {}
    learned_from = sorted((folder / "pictures" / f"10_{WORD}").glob("*.png"))[: len(PROMPTS)]
    pictures = [Image.open(file) for file in learned_from]
    captions = [f"learned from: {file.with_suffix('.caption').read_text()}" for file in learned_from]
    for name, multiplier in (("before", 0.0), ("after", 1.0)):
        network.set_multiplier(multiplier)
        with torch.no_grad():
            losses[name] = held_out_loss(model, folder / "held_out")
        for seed, prompt in enumerate(PROMPTS):
            request = PromptLine(prompt, None, 64, 64, seed, SCALE, STEPS, SAMPLER)
            pictures.append(paint(model, request))
    captions += [f"{name}: {prompt}" for name in losses for prompt in PROMPTS]
    sheet = folder / "before_after.png"
    contact_sheet(pictures, captions, columns=len(PROMPTS)).save(sheet)

    better = 1 - losses["after"] / losses["before"]
    print(f"\nLoss on {HELD_OUT} pictures it has not seen: {losses['before']:.4f} before, {losses['after']:.4f} after")
    print(f"That is {better:.0%} less.\n\nBefore and after: {sheet}\nThe LoRA: {lora}\n\nTo try next:")
    python = str(shortest(Path(sys.executable)))
    print(" ", quoted([python, "-m", "tensorboard.main", "--logdir", str(folder / "logs")]))
    print(" ", quoted([python, str(shortest(base.script)), "--help"]))
    print(
        " ", quoted([python, str(shortest(ROOT / "examples" / "miniature" / "evaluate.py")), "--sheet", "pictures.png"])
    )


def held_out_loss(model, folder: Path) -> float:
    """The mean loss over the pictures of a folder, each at the same timesteps and with the same noise every time."""
    import torch
    from torch import nn

    from library.data.config import load_datasets
    from library.data.dataset import ImageDataset
    from library.data.plan import RunPlan
    from library.data.records import scan
    from library.models.noise import sample_noise
    from library.options import DatasetOptions
    from library.training.step import TrainingStep

    datasets = load_datasets(
        DatasetOptions(train_data_dir=str(folder), resolution="64", train_batch_size=HELD_OUT), frozenset()
    )
    table = scan(datasets)
    (plan,) = RunPlan(table, datasets, seed=0).iterate(0, 1)
    batch = ImageDataset(table, datasets)[plan]
    step = TrainingStep(model, nn.Module(), model.noise_process())
    latents = step.latents_of(batch)
    losses = []
    for timestep in TIMESTEPS:
        noise = sample_noise(latents.shape[1:], [seed + timestep for seed in batch.seeds])
        losses.append(step.losses(batch, latents, noise, torch.full((len(latents),), timestep)))
    return float(torch.stack(losses).mean())


def shortest(path: Path) -> Path:
    """The path from here where it lies below, else from the root."""
    path = path.absolute()  # a virtual environment's Python must not be resolved to the one it was made from
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quoted(command: list[str]) -> str:
    """A command as this system's shell takes it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def show(command: list[str]) -> str:
    """A command over several lines."""
    end = " ^\n  " if os.name == "nt" else " \\\n  "
    return end.join([quoted(command[:4]), *(quoted([word]) for word in command[4:])])


if __name__ == "__main__":
    cli.run(main)
