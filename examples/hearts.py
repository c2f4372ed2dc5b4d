"""What the examples teach: hearts that are called "sks", a shape and a word that the miniatures do not know."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from examples.miniature.shapes import COLOURS, Mask, Scene, draw, heart
from library.randomness import generator

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


def draw_pictures(folder: Path, scenes: Iterable[Scene], mask: Mask | None = None) -> None:
    """One picture with a caption file for each scene, the names numbered; `mask` draws a shape that SHAPES lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(draw(scene, mask)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.caption").write_text(scene.caption)


def draw_hearts(folder: Path, called: str = WORD) -> None:
    """Hearts to learn from in `pictures`, and to measure with in `held_out`; their captions call them as said."""
    scenes = [replace(scene, shape=called) for scene in hearts(PICTURES + HELD_OUT)]
    draw_pictures(folder / "pictures" / f"10_{WORD}", scenes[:PICTURES], heart)
    draw_pictures(folder / "held_out" / f"1_{WORD}", scenes[PICTURES:], heart)
