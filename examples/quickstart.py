"""Teaches a miniature model a shape it does not know, and shows what it painted before and after.

Draws 12 pictures of a heart that is called "sks", trains a LoRA on them with train_network.py (with --sdxl on the SDXL
miniature, with sdxl_train_network.py), measures the LoRA on pictures that it has not seen, and writes everything to
output/quickstart.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from examples.commands import LAUNCH, ROOT, quoted, run, shortest, show
from examples.hearts import HELD_OUT, PICTURES, PROMPTS, WORD, draw_hearts
from examples.measuring import mean_loss, painted, with_lora
from examples.miniature.evaluate import MODEL, SCALE, SDXL_MODEL, STEPS
from examples.sheet import contact_sheet
from library import cli, console
from library.errors import UserError
from library.training.preflight import make_writable


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
    draw_hearts(folder)

    command = training_command(base, folder)
    print("Training the LoRA:", show(command), sep="\n\n", end="\n\n", flush=True)
    run(command)
    report(base, folder)


def training_command(base: Base, folder: Path) -> list[str]:
    """The command line of the training, as a user would type it."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt} --w 64 --h 64 --d 1 --l {SCALE} --s {STEPS}\n" for prompt in PROMPTS[:2]))
    return [
        *(*LAUNCH, "--num_cpu_threads_per_process=2", str(shortest(base.script))),
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
        from library.models.registry import load_model
    model = load_model(base.model)
    lora = folder / f"{WORD}.safetensors"
    network = with_lora(model, lora)

    losses = {}
    learned_from = sorted((folder / "pictures" / f"10_{WORD}").glob("*.png"))[: len(PROMPTS)]
    pictures = [Image.open(file) for file in learned_from]
    captions = [f"learned from: {file.with_suffix('.caption').read_text()}" for file in learned_from]
    for name, multiplier in (("before", 0.0), ("after", 1.0)):
        network.set_multiplier(multiplier)
        losses[name] = mean_loss(model, folder / "held_out")
        pictures += painted(model, PROMPTS)
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


if __name__ == "__main__":
    cli.run(main)
