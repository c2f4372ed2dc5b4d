"""What a trained LoRA paints: in previews of its run, here from its file, and in Diffusers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.generation.samplers import make_scheduler
from library.models.family import Family
from networks.lora import create_network_from_weights
from tests.pipelines import picture_of, pipeline_of, pixels


def with_lora(model: Family, file: Path) -> Family:
    points = model.attach_points()
    network, weights = create_network_from_weights(1.0, file, None, points.text_encoders, points.unet)
    network.apply_to(points.text_encoders, points.unet)
    network.load_state_dict(weights)
    model.lora = network.eval()  # that it lives as long
    return model


def check_previews(output: Path, stamp: str, prompts: Sequence[str], load: Callable[[], Family]) -> None:
    """The previews are what `run.safetensors` in the same folder paints beside the model, and not what that paints."""
    plain, trained = load(), with_lora(load(), output / "run.safetensors")
    for number, line in enumerate(prompts):
        (preview,) = (output / "sample").glob(f"run_{stamp}_{number:02d}_*.png")
        shown = pixels(Image.open(preview))
        assert np.abs(shown - pixels(paint(trained, parse_line(line)))).max() <= 1
        assert np.abs(shown - pixels(paint(plain, parse_line(line)))).mean() > 2


def check_in_diffusers(file: Path, load: Callable[[], Family]) -> None:
    """A LoRA paints in a pipeline of Diffusers what it paints here."""
    request = parse_line("sks, a red circle --n blue --w 32 --h 48 --s 6 --l 5 --d 3")
    plain, ours = pixels(paint(load(), request)), pixels(paint(with_lora(load(), file), request))
    model = load()
    pipeline = pipeline_of(model, make_scheduler("ddim", model.noise_process()))
    pipeline.load_lora_weights(file)
    assert np.abs(ours - plain).mean() > 4, "the LoRA must be seen for its picture to be compared"
    assert np.abs(ours - picture_of(pipeline, request)).mean() < 0.2
