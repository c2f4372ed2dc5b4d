"""Whole runs of train_network.py beside a tiny Stable Diffusion 2.x model, and what they leave behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.models.family import Family
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.noise import Prediction
from library.models.registry import load_model
from tests.test_lora_names import published_shapes
from tests.test_training import PROPORTIONAL, assert_equal_to_rounding
from tests.tiny import draw_pictures, largest_difference, read_log, scalars
from tests.trained import check_in_diffusers, check_previews

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPTS = ("a red circle --w 32 --h 32 --s 2 --d 7", "sks --n blue --w 48 --h 32 --s 2 --l 4 --d 8")
# The parts of Stable Diffusion 2.x that the tiny model has.
PARTS = (
    "lora_te_text_model_encoder_layers_0_",
    "lora_te_text_model_encoder_layers_1_",
    "lora_unet_down_blocks_0_attentions_0_",
    "lora_unet_mid_block_attentions_0_",
    "lora_unet_up_blocks_1_attentions_0_",
    "lora_unet_up_blocks_1_attentions_1_",
)
VELOCITY = Prediction("v_prediction", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def v2_file(model_files) -> Path:
    return model_files("sd2")


@pytest.fixture(scope="module")
def v2_flags(flags, v2_file):
    def make(output_dir: Path, **changes: object) -> list[str]:
        return flags(output_dir, **{"pretrained_model_name_or_path": v2_file, "v2": True} | changes)

    return make


@pytest.fixture
def v2_run(train, v2_flags, tmp_path):
    """`v2_run(name, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, **changes: object) -> Path:
        train(v2_flags(tmp_path / name, **changes))
        return tmp_path / name / "run.safetensors"

    return start


@pytest.fixture(scope="module")
def work(tmp_path_factory, v2_flags, fork_server):
    """The folder of a run towards v, and how it ended."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = v2_flags(
        folder / "out",
        v_parameterization=True,
        zero_terminal_snr=True,
        learning_rate=0.05,
        max_train_steps=6,
        save_precision="float",
        sample_prompts=folder / "prompts.txt",
        sample_every_n_steps=6,
        logging_dir=folder / "logs",
    )
    return folder, fork_server.run(words)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def predicting_v(path: Path) -> Family:
    model = load_model(path)
    model.prediction = VELOCITY
    return model


def test_a_run_ends_well_and_both_parts_have_learned(work):
    folder, ended = work
    assert ended.status == 0, ended.said
    assert "Traceback" not in ended.said
    weights = load_file(folder / "out" / "run.safetensors")
    assert all(tensor.isfinite().all() and tensor.any() for tensor in weights.values())
    losses = scalars(read_log(folder / "logs"), "loss/current")
    assert len(losses) == 6
    assert all(np.isfinite(loss) for loss in losses.values())


def test_the_weights_have_the_published_names(work):
    published = published_shapes("sd2", convolutional=False)
    weights = load_file(work[0] / "out" / "run.safetensors")
    assert weights.keys() == {key for key in published if key.startswith(PARTS)}
    assert len(weights) == 3 * (2 * 6 + 4 * 12)


def test_the_metadata_tell_version_and_prediction(work, v2_run):
    told = {
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
        "ss_zero_terminal_snr": "True",
    }
    metadata = metadata_of(work[0] / "out" / "run.safetensors")
    assert {key: metadata[key] for key in told} == told
    of_noise = told | {
        "modelspec.architecture": "stable-diffusion-v2-512/lora",
        "modelspec.prediction_type": "epsilon",
        "ss_zero_terminal_snr": "False",
    }
    metadata = metadata_of(v2_run("noise", max_train_steps=1))
    assert {key: metadata[key] for key in told} == of_noise


def test_previews_are_those_of_the_saved_file(work, v2_file):
    """Painted towards v, as the run was."""
    check_previews(work[0] / "out", "000006", PROMPTS, lambda: predicting_v(v2_file))


def test_the_lora_paints_in_diffusers_what_it_paints_here(work, v2_file):
    check_in_diffusers(work[0] / "out" / "run.safetensors", lambda: predicting_v(v2_file))


def test_cached_outputs_train_as_those_of_every_step(v2_run, tmp_path):
    """The files are not those of Stable Diffusion 1.x, which say something else."""
    folder = draw_pictures(tmp_path / "data" / "1_sks shape", 3)
    common = {"train_data_dir": folder.parent, "network_train_unet_only": True, "max_train_steps": 3} | PROPORTIONAL
    fresh = v2_run("fresh", **common)
    assert_equal_to_rounding(fresh, v2_run("cached", **common, cache_text_encoder_outputs_to_disk=True))
    v2_run("latents", **common, cache_latents_to_disk=True)
    assert len(list(folder.glob("*_sd2_te_outputs.npz"))) == len(list(folder.glob("*_0032x0032_sd.npz"))) == 3
    with np.load(folder / "32_0_sd2_te_outputs.npz") as file:
        assert file["hidden_state1"].shape == (77, 64)


def test_what_is_predicted_decides_what_is_learned(v2_run):
    common = PROPORTIONAL | {"max_train_steps": 1}
    noise = v2_run("noise", **common)
    velocity = v2_run("velocity", v_parameterization=True, **common)
    shifted = v2_run("shifted", v_parameterization=True, zero_terminal_snr=True, **common)
    assert largest_difference(noise, velocity) > 1e-4
    assert largest_difference(velocity, shifted) > 1e-4


def test_a_file_that_says_v_is_trained_with_its_flag_or_not_at_all(v2_flags, train, tmp_path, v2_file, capsys):
    with open_weights(v2_file) as file:
        tensors = file.tensors()
    path = tmp_path / "velocity.safetensors"
    write_tensors(path, tensors | {"v_pred": torch.zeros(0)})
    words = v2_flags(tmp_path / "out", pretrained_model_name_or_path=path, max_train_steps=1)
    with pytest.raises(SystemExit, match="2"):
        train(words)
    assert f"error: {path} predicts v, not the noise: add --v_parameterization" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    train([*words, "--v_parameterization"])
    metadata = metadata_of(tmp_path / "out" / "run.safetensors")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
