"""What model files say of what their denoisers predict."""

from pathlib import Path

import pytest
import torch

from library.models.files.checkpoint import open_weights, write_tensors
from library.models.files.selection import Selection
from library.models.noise import Prediction
from library.models.prediction import markers, prediction_of
from library.models.registry import inspect_model, load_model

V, ZERO = torch.zeros(0), torch.zeros(0)


def said(path: Path, tensors, metadata=None, scheduler=None) -> Prediction | None:
    write_tensors(path, tensors, metadata=metadata)
    with open_weights(path) as file:
        configs = {} if scheduler is None else {"scheduler": scheduler}
        entries = {key: (file, key) for key in file.keys()}  # noqa: SIM118 - a file is no mapping
        return prediction_of(Selection(path, entries, [file], file.metadata, configs))


@pytest.mark.parametrize(
    ("tensors", "metadata", "scheduler", "expected"),
    [
        ({}, None, None, None),
        ({"v_pred": V}, None, None, Prediction("v_prediction")),
        ({"v_pred": V, "ztsnr": ZERO}, None, None, Prediction("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, None, Prediction("v_prediction")),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, Prediction()),
        ({}, {"modelspec.prediction_type": "rf"}, None, None),
        ({}, None, {"prediction_type": "epsilon"}, Prediction()),
        ({}, None, {"prediction_type": "v_prediction"}, Prediction("v_prediction")),
        (
            {},
            None,
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            Prediction("v_prediction", True),
        ),
        # the file's own marker is nearer to the weights than what is written about it
        ({"v_pred": V}, {"modelspec.prediction_type": "epsilon"}, None, Prediction("v_prediction")),
        ({"ztsnr": ZERO}, {"modelspec.prediction_type": "v"}, None, Prediction("v_prediction", True)),
    ],
)
def test_markers_metadata_and_schedulers_are_read(tmp_path, tensors, metadata, scheduler, expected):
    assert said(tmp_path / "a.safetensors", {"w": torch.ones(1)} | tensors, metadata, scheduler) == expected


def test_markers_are_empty_tensors_of_the_customary_names():
    assert not markers(Prediction())
    assert list(markers(Prediction("v_prediction"))) == ["v_pred"]
    assert list(markers(Prediction("v_prediction", True))) == ["v_pred", "ztsnr"]
    assert all(tensor.shape == (0,) for tensor in markers(Prediction("v_prediction", True)).values())


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_a_model_predicts_goes_through_its_file(tmp_path, model_files, family, suffix):
    model = load_model(model_files(family))
    assert model.prediction == Prediction()
    model.prediction = Prediction("v_prediction", zero_terminal_snr=True)
    model.save(tmp_path / f"v{suffix}")
    info = inspect_model(tmp_path / f"v{suffix}")
    assert info.prediction == model.prediction
    again = info.load()
    assert again.prediction == model.prediction
    assert again.noise_process().prediction == model.prediction
    again.save(tmp_path / f"again{suffix}")
    with open_weights(tmp_path / f"again{suffix}") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
    if family == "sd2":
        assert again.architecture == "stable-diffusion-v2-768-v"
        assert load_model(model_files(family)).architecture == "stable-diffusion-v2-512"


def test_a_model_that_is_trained_on_otherwise_leaves_its_marker(tmp_path, model_files):
    """As after a run on the noise, whose file must not say v."""
    model = load_model(model_files("sdxl"))
    model.prediction = Prediction("v_prediction")
    model.save(tmp_path / "v.safetensors")
    loaded = load_model(tmp_path / "v.safetensors")
    loaded.prediction = Prediction()
    loaded.save(tmp_path / "noise.safetensors")
    assert inspect_model(tmp_path / "noise.safetensors").prediction is None
