"""What model files say of what their denoisers predict."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.models.diffusers_writer import write_folder
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.files.selection import Selection
from library.models.noise import Prediction
from library.models.prediction import markers, prediction_of
from library.models.registry import inspect_model, load_model
from tests import tiny

V, ZERO = torch.zeros(0), torch.zeros(0)


def what_is_said(path: Path, tensors, metadata=None, scheduler=None) -> Prediction | None:
    write_tensors(path, tensors, metadata=metadata)
    with open_weights(path) as file:
        configs = {} if scheduler is None else {"scheduler": scheduler}
        entries = {key: (file, key) for key in file.keys()}  # noqa: SIM118 - a file is no mapping
        return prediction_of(Selection(path, entries, [file], file.metadata, configs))


@pytest.fixture
def folder_with(tmp_path, model_files) -> Callable[..., Path]:
    """A Diffusers folder of Stable Diffusion 1.x with changes to its scheduler."""

    def make(scheduler: Mapping[str, Any]) -> Path:
        write_folder(load_model(model_files("sd1")), tmp_path / "folder")
        file = tmp_path / "folder/scheduler/scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {**scheduler}))
        return tmp_path / "folder"

    return make


@pytest.mark.parametrize(
    ("tensors", "metadata", "scheduler", "expected"),
    [
        ({}, None, None, None),
        ({"v_pred": V}, None, None, Prediction("v_prediction")),
        ({"v_pred": V, "ztsnr": ZERO}, None, None, Prediction("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, None, Prediction("v_prediction")),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, Prediction()),
        ({}, {"modelspec.prediction_type": " "}, None, None),
        ({}, {"modelspec.prediction_type": "V"}, None, Prediction("v_prediction")),
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
    assert what_is_said(tmp_path / "a.safetensors", {"w": torch.ones(1)} | tensors, metadata, scheduler) == expected


@pytest.mark.parametrize(
    ("metadata", "scheduler", "kind"),
    [
        ({"modelspec.prediction_type": "rf"}, None, "rf"),
        (None, {"prediction_type": "sample"}, "sample"),
        (None, {"prediction_type": "flow_prediction"}, "flow_prediction"),
        (None, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow_prediction"),
        (None, {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "EDM"),
    ],
)
def test_another_prediction_is_no_silence(tmp_path, metadata, scheduler, kind):
    with pytest.raises(UserError, match=f"it says that it predicts '{kind}', not the noise or v"):
        what_is_said(tmp_path / "a.safetensors", {"w": torch.ones(1)}, metadata, scheduler)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"beta_end": 0.0120000001, "trained_betas": None}, None),
        ({"beta_schedule": "linear"}, "another beta_schedule than"),
        ({"beta_end": 0.02, "num_train_timesteps": 500}, "another beta_end, num_train_timesteps than"),
    ],
)
def test_another_noise_schedule_is_told(folder_with, fresh_console, capsys, changes, told):
    inspect_model(folder_with(scheduler=changes))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "its scheduler has" in line]
    assert len(warnings) == (told is not None)
    assert not told or told in warnings[0]


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
    model.prediction = Prediction("v_prediction", zero_terminal_snr=True)
    model.save(tmp_path / "v.safetensors")
    loaded = load_model(tmp_path / "v.safetensors")
    loaded.prediction = Prediction("v_prediction")
    loaded.save(tmp_path / "no_zero.safetensors")
    assert inspect_model(tmp_path / "no_zero.safetensors").prediction == Prediction("v_prediction")
    loaded.prediction = Prediction()
    loaded.save(tmp_path / "noise.safetensors")
    assert inspect_model(tmp_path / "noise.safetensors").prediction == Prediction()
    with open_weights(tmp_path / "noise.safetensors") as file:
        assert not {"v_pred", "ztsnr"} & set(file.keys())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_files_own_markers_stay_as_they_are(tmp_path, model_files, suffix):
    with open_weights(model_files("sd1")) as file:
        tensors = file.tensors()
    own = {"v_pred": torch.ones(1, dtype=torch.float16), "ztsnr": torch.tensor(3)}
    write_tensors(tmp_path / f"a{suffix}", tensors | own)
    load_model(tmp_path / f"a{suffix}", None).save(tmp_path / f"b{suffix}")
    with open_weights(tmp_path / f"b{suffix}") as file:
        assert set(file.keys()) == tensors.keys() | own.keys()
        for key, tensor in own.items():
            assert (file.dtype(key), file.shape(key)) == (tensor.dtype, tuple(tensor.shape))
            assert torch.equal(file.get(key), tensor)


TELLTALE = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("family", "spread", "metadata", "expected"),
    [
        ("sd2", 0.1, None, True),
        ("sd2", 0.08, None, False),
        ("sd2", 0.1, {"modelspec.prediction_type": "v"}, False),
        ("sd1", 0.1, None, False),
    ],
)
def test_a_silent_file_is_judged_by_its_weights(tmp_path, family, spread, metadata, expected):
    tensors = dict(tiny.make_model(family).tensors())
    noise = torch.randn(tensors[TELLTALE].shape, generator=torch.Generator().manual_seed(0))
    tensors[TELLTALE] = noise / noise.std(unbiased=False) * spread
    write_tensors(tmp_path / "a.safetensors", tensors, metadata=metadata)
    assert inspect_model(tmp_path / "a.safetensors").looks_like_v == expected
