"""The miniature model: its pictures, the judge of what it paints, and whether it paints what it is asked."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.miniature.evaluate import MODEL, SAMPLER, SCALE, SDXL_MODEL, STEPS, judge, scenes
from examples.miniature.shapes import COLOURS, SHAPES, Scene, draw, heart, random_scene

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_judge_recognises_a_drawn_scene(shape: str) -> None:
    rng = np.random.default_rng(list(SHAPES).index(shape))
    for _ in range(3):
        scene = random_scene(rng, shape=shape)
        verdict = judge(Image.fromarray(draw(scene)))
        assert (verdict.background, verdict.colour, verdict.shape) == (scene.background, scene.colour, scene.shape)


def test_judge_is_not_fooled_by_an_empty_picture_or_an_unknown_shape() -> None:
    assert judge(Image.new("RGB", (64, 64), COLOURS["red"])).shape == "nothing"
    known = judge(Image.fromarray(draw(Scene("circle", "red", "white"))))
    unknown = judge(Image.fromarray(draw(Scene("heart", "red", "white"), heart)))
    assert unknown.overlap < known.overlap


def test_vocabulary_has_six_shapes_and_eight_colours() -> None:
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8


def test_evaluation_asks_for_every_shape_and_colour() -> None:
    asked = list(scenes(64))
    assert {scene.shape for scene in asked} == set(SHAPES)
    assert {scene.colour for scene in asked} == set(COLOURS)
    assert all(scene.colour != scene.background for scene in asked)


def test_model_files_are_small() -> None:
    assert MODEL.stat().st_size <= 20_000_000
    assert SDXL_MODEL.stat().st_size <= 24_000_000


@pytest.mark.parametrize("file", [MODEL, SDXL_MODEL], ids=["sd1", "sdxl"])
def test_miniature_paints_what_its_prompt_says(file: Path) -> None:
    from library.generation.paint import paint
    from library.generation.prompts import PromptLine
    from library.models.registry import load_model

    model = load_model(file)
    right = 0
    for number, scene in enumerate(scenes(8)):
        request = PromptLine(scene.caption, None, 64, 64, number, SCALE, STEPS, SAMPLER)
        verdict = judge(paint(model, request))
        right += (verdict.background, verdict.colour) == (scene.background, scene.colour)
    assert right >= 6


@pytest.mark.slow
@pytest.mark.parametrize("file", [MODEL, SDXL_MODEL], ids=["sd1", "sdxl"])
def test_quality_over_64_prompts_is_as_the_readme_says(file: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "miniature" / "evaluate.py"), "--model", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shares = {line.split(":")[0]: int(line.split()[1]) / 64 for line in output.splitlines()}
    assert shares["background"] >= 0.9
    assert shares["colour"] >= 0.9
    assert shares["shape"] >= 0.75


@pytest.mark.slow
def test_quickstart_teaches_the_new_shape(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output_dir", str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert int(output.split("That is ")[1].split("%")[0]) >= 20
    for name in ("before_after.png", "sks.safetensors", "logs"):
        assert (tmp_path / "out" / name).exists()
