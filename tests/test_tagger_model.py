"""Taggers as ONNX models whose answers are known: what they are given, what they give, and on what they run."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from PIL import Image

from library.errors import UserError
from library.preprocessing.tagging.folder import white_square
from library.preprocessing.tagging.tagger import Tagger
from tests import tagger_models


def seen(path: Path, model: onnx.ModelProto, outputs: int, side: int = 8) -> list[float]:
    """What a model answers to a picture."""
    onnx.save(model, path.with_suffix(".onnx"))
    found = Tagger(path.with_suffix(".onnx"), outputs).probabilities(white_square(path, side)[None])
    return found[0].tolist()


def save(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    Image.new(mode, size, colour).save(path)
    return path


def test_channels_are_blue_green_red_from_0_to_255(tmp_path):
    path = save(tmp_path / "a.png", (51, 102, 255))
    assert seen(path, tagger_models.mean_model(), 3) == pytest.approx([1.0, 0.4, 0.2])


def test_transparency_is_white(tmp_path):
    clear = save(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")
    half = save(tmp_path / "b.png", (0, 0, 0, 51), mode="RGBA")
    assert seen(clear, tagger_models.mean_model(), 3) == [1, 1, 1]
    assert seen(half, tagger_models.mean_model(), 3) == pytest.approx([0.8] * 3, abs=0.003)


@pytest.mark.parametrize(("size", "row", "column"), [((8, 4), 2, 0), ((8, 3), 2, 0), ((4, 8), 0, 2), ((3, 8), 0, 2)])
def test_pictures_are_in_the_middle_of_a_white_square(tmp_path, size, row, column):
    width, height = size
    path = save(tmp_path / "a.png", (0, 0, 0), size)
    every = [(y, x) for y in range(8) for x in range(8)]
    inside = [row <= y < row + height and column <= x < column + width for y, x in every]
    assert seen(path, tagger_models.pixel_model(every), 64) == [0.0 if black else 1.0 for black in inside]


def test_pictures_are_averaged_when_they_shrink(tmp_path):
    columns = np.zeros((16, 16, 3), np.uint8)
    columns[:, ::2] = 255
    Image.fromarray(columns).save(tmp_path / "a.png")
    found = seen(tmp_path / "a.png", tagger_models.pixel_model([(0, 0), (4, 5)]), 2)
    assert found == pytest.approx([0.5, 0.5], abs=0.003)


def test_a_long_strip_needs_no_huge_square(tmp_path):
    path = save(tmp_path / "a.png", (0, 0, 0), (2, 40000))
    square = white_square(path, 8)
    assert (square[:, [0, 7]] == 255).all()
    assert square.mean() > 250


def test_pictures_are_turned_as_they_are_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right: what is left is above
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert seen(tmp_path / "a.png", tagger_models.pixel_model([(0, 0), (0, 7), (7, 0)]), 3) == [1, 1, 0]


@pytest.mark.parametrize("batch", [None, 1, 2, 8])
def test_batches_of_models_for_any_and_for_a_fixed_size(tmp_path, batch):
    onnx.save(tagger_models.mean_model(batch=batch), tmp_path / "model.onnx")
    pictures = np.random.default_rng(0).uniform(0, 255, (5, 8, 8, 3)).astype(np.float32)
    found = Tagger(tmp_path / "model.onnx", 3).probabilities(pictures)
    np.testing.assert_allclose(found, pictures.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_half_precision(tmp_path):
    onnx.save(tagger_models.input_model((None, 8, 8, 3), TensorProto.FLOAT16), tmp_path / "model.onnx")
    found = Tagger(tmp_path / "model.onnx", 3).probabilities(np.full((1, 8, 8, 3), 0.5, np.float32))
    assert found.dtype == np.float32
    assert (found == 0.5).all()


def test_models_for_any_size_get_448_pixels(tmp_path, fresh_console, capsys):
    onnx.save(tagger_models.input_model((None, None, None, 3)), tmp_path / "model.onnx")
    assert Tagger(tmp_path / "model.onnx", 3).side == 448
    assert "given to it in 448x448" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((None, 3, 8, 8), r"takes \((\?|batch_size), 3, 8, 8\)"),
        ((None, 8, 16, 3), "takes pictures of 16x8, a tagger takes square ones"),
        ((None, 12, 3), r"a tagger takes \(pictures, height, width, 3\)"),
    ],
)
def test_models_that_take_something_else(tmp_path, shape, sentence):
    onnx.save(tagger_models.input_model(shape), tmp_path / "model.onnx")
    with pytest.raises(UserError, match=sentence):
        Tagger(tmp_path / "model.onnx", shape[-1])


def test_models_that_give_something_else(tmp_path):
    onnx.save(tagger_models.mean_model(), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="gives 3 probabilities, but the list beside it has 4 tags"):
        Tagger(tmp_path / "model.onnx", 4)
    tagger = Tagger(tmp_path / "model.onnx", 3)
    for value in (-255.0, 512.0, np.nan):
        with pytest.raises(UserError, match="gives numbers beyond 0 to 1"):
            tagger.probabilities(np.full((1, 8, 8, 3), value, np.float32))


def test_a_provider_that_is_not_there(tmp_path):
    onnx.save(tagger_models.mean_model(), tmp_path / "model.onnx")
    assert Tagger(tmp_path / "model.onnx", 3, "cpu").provider == "CPUExecutionProvider"
    with pytest.raises(UserError, match=r"--provider: this onnxruntime has no cudo, only .*cpu"):
        Tagger(tmp_path / "model.onnx", 3, "cudo")


def test_cuda_computes_as_exactly_as_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    asked, opened = [], onnxruntime.InferenceSession

    def session(path: Path, options: object, providers: list) -> onnxruntime.InferenceSession:
        asked.extend(providers)
        return opened(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    onnx.save(tagger_models.mean_model(), tmp_path / "model.onnx")
    Tagger(tmp_path / "model.onnx", 3)
    assert dict([asked[0]])["CUDAExecutionProvider"] == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert asked[1:] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("provider", [None, "cuda"])
def test_a_provider_that_does_not_work(tmp_path, monkeypatch, fresh_console, capsys, provider):
    # as a build for CUDA does without a GPU: it goes on with the CPU by itself
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    onnx.save(tagger_models.mean_model(), tmp_path / "model.onnx")
    if provider is None:
        assert Tagger(tmp_path / "model.onnx", 3).provider == "CPUExecutionProvider"
        assert capsys.readouterr().err.count("is built for CUDA, which does not work on this machine") == 1
    else:
        with pytest.raises(UserError, match="--provider: CUDA does not work on this machine"):
            Tagger(tmp_path / "model.onnx", 3, provider)
