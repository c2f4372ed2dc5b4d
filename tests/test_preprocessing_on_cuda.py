"""Captions and tags on a GPU of NVIDIA's, where there is one."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from library.devices import fastest_device
from library.errors import UserError
from library.preprocessing.tagging.tagger import Tagger
from tests import tagger_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU for CUDA")
NAMES = ["a.png", "b.png", "c.png", "d.png"]
needs_onnxruntime = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA"
)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 40, 3), np.uint8) for _ in NAMES]


@pytest.fixture(scope="module", params=["blip", "git"])
def model(tmp_path_factory, request) -> Path:
    from tests import captioners

    return getattr(captioners, f"save_{request.param}")(tmp_path_factory.mktemp("captioners") / request.param)


def captions(
    model: Path, pictures: list[np.ndarray], precision: str, device: torch.device, size: int, **how: object
) -> list[str]:
    from library.preprocessing.captioning.captioner import load_captioner
    from library.preprocessing.captioning.sampling import Choice

    captioner = load_captioner("--model_id", model, None, precision=precision, device=device)
    inputs = [captioner.reader(picture) for picture in pictures]
    choice = Choice(max_length=12, **how)
    made = []
    for start in range(0, len(inputs), size):
        made += captioner.caption(choice, NAMES[start : start + size], inputs[start : start + size])
    assert str(device) in captioner.place
    return made


@pytest.mark.parametrize("how", [{}, {"beams": 3}, {"beams": None, "top_p": 0.9}])
def test_captions_are_those_of_the_cpu(model, pictures, how):
    expected = captions(model, pictures, "float", torch.device("cpu"), 1, **how)
    assert len(set(expected)) > 1
    for size in (1, 3):
        assert captions(model, pictures, "float", fastest_device(), size, **how) == expected


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("how", [{"beams": 2}, {"beams": None}])
def test_half_precision(model, pictures, precision, how):
    made = captions(model, pictures, precision, fastest_device(), 4, **how)
    assert all(made)
    assert made == captions(model, pictures, precision, fastest_device(), 4, **how)


def test_memory_that_does_not_suffice(model, pictures):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(UserError, match="--precision: the model does not fit into the memory of cuda"):
            captions(model, pictures, "float", fastest_device(), 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_onnxruntime
def test_probabilities_are_those_of_the_cpu(tmp_path):
    onnx.save(tagger_models.network_model(200), tmp_path / "model.onnx")
    squares = np.random.default_rng(0).uniform(0, 255, (5, 32, 32, 3)).astype(np.float32)
    tagger = Tagger(tmp_path / "model.onnx", 200)
    assert tagger.provider == "CUDAExecutionProvider"
    expected = Tagger(tmp_path / "model.onnx", 200, "cpu").probabilities(squares)
    np.testing.assert_allclose(tagger.probabilities(squares), expected, atol=1e-5)  # TF32 is wrong by 1e-3
    again = Tagger(tmp_path / "model.onnx", 200).probabilities(squares)
    np.testing.assert_array_equal(again, tagger.probabilities(squares))
