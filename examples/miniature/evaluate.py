"""Measures how often a miniature paints what its prompt says.

`python examples/miniature/evaluate.py` paints 64 prompts with fixed seeds, judges background, colour and shape, prints
the shares that are right, and with --sheet FILE writes the pictures. The model is the Stable Diffusion 1.x miniature
unless --model names another.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from examples.miniature.shapes import COLOURS, SHAPES, Mask, Scene, coverage
from examples.sheet import contact_sheet
from library import cli, console
from library.training.preflight import make_writable

MODEL = Path(__file__).parent / "miniature.safetensors"
SDXL_MODEL = Path(__file__).parent / "miniature_sdxl.safetensors"
SCALE, STEPS, SAMPLER = 4.0, 25, "ddim"
# Templates are tried at these sizes, relative to the figure's half extent, and at these distances from its middle.
_RADII = (1.0, 1.06, 1.13, 1.2)
_OFFSETS = (-0.035, 0.0, 0.035)


class Verdict(NamedTuple):
    """What a picture shows."""

    background: str
    colour: str
    shape: str
    overlap: float


def nearest_colour(rgb: np.ndarray) -> str:
    """The name of the palette's colour with the smallest distance to `rgb`."""
    return min(COLOURS, key=lambda name: float(np.sum((rgb - np.asarray(COLOURS[name], float)) ** 2)))


def judge(picture: Image.Image, shapes: dict[str, Mask] = SHAPES) -> Verdict:
    """Background: the median of the border; colour: the median of what differs from it; shape: the template that
    overlaps best (intersection over union) with the pixels nearer to the colour than to the background.
    """
    pixels = np.asarray(picture.convert("RGB"), float)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    background = np.median(edge, axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    different = distance > max(60.0, 0.5 * distance.max())
    colour = np.median(pixels[different], axis=0) if different.any() else background
    figure = np.linalg.norm(pixels - colour, axis=-1) < distance
    shape, overlap = best_template(figure, shapes)
    return Verdict(nearest_colour(background), nearest_colour(colour), shape, overlap)


def best_template(figure: np.ndarray, shapes: dict[str, Mask]) -> tuple[str, float]:
    """(shape, intersection over union) of the template that fits a figure (H, W) of booleans best, tried at sizes and
    places around the figure's own.
    """
    if not figure.any():
        return "nothing", 0.0
    height, width = figure.shape
    rows, columns = np.where(figure.any(1))[0], np.where(figure.any(0))[0]
    middle = (
        ((columns[0] + columns[-1] + 1) / 2 - width / 2) / min(width, height),
        ((rows[0] + rows[-1] + 1) / 2 - height / 2) / min(width, height),
    )
    half = max(rows[-1] - rows[0], columns[-1] - columns[0]) / 2 / min(width, height)
    best = ("nothing", 0.0)
    for name, mask in shapes.items():
        for radius, dx, dy in itertools.product(_RADII, _OFFSETS, _OFFSETS):
            template = (
                coverage(mask, (width, height), half * radius, (middle[0] + dx, middle[1] + dy), oversample=1) > 0.5
            )
            overlap = np.sum(template & figure) / np.sum(template | figure)
            if overlap > best[1]:
                best = (name, float(overlap))
    return best


def scenes(count: int, seed: int = 0) -> Iterable[Scene]:
    """Scenes to ask for; every shape and colour comes equally often, up to one."""
    rng = np.random.default_rng(seed)
    shapes, colours = list(SHAPES), list(COLOURS)
    for number in range(count):
        colour = colours[number % len(colours)]
        background = rng.choice([name for name in colours if name != colour])
        yield Scene(shapes[(number * 5 + number // len(colours)) % len(shapes)], colour, str(background))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--sheet", type=Path, help="also write the pictures, labelled, to this file")
    options = parser.parse_args()
    console.setup(None)
    if options.sheet:
        make_writable("--sheet", str(options.sheet.absolute().parent))
    with console.quiet_dependencies():
        from library.generation.paint import paint
        from library.generation.prompts import PromptLine
        from library.models.registry import load_model
    model = load_model(options.model)
    wanted = list(scenes(options.count))
    requests = [
        PromptLine(scene.caption, width=64, height=64, seed=number, scale=SCALE, sample_steps=STEPS, sampler=SAMPLER)
        for number, scene in enumerate(wanted)
    ]
    pictures = [paint(model, request) for request in requests]
    verdicts = [judge(picture) for picture in pictures]
    for what in ("background", "colour", "shape"):
        right = sum(getattr(v, what) == getattr(s, what) for v, s in zip(verdicts, wanted, strict=True))
        print(f"{what}: {right} of {len(wanted)} right ({right / len(wanted):.0%})")
    if options.sheet:
        contact_sheet(pictures, [scene.caption for scene in wanted], columns=8).save(options.sheet)


if __name__ == "__main__":
    cli.run(main)
