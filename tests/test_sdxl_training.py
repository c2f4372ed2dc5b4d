"""Whole runs of sdxl_train_network.py beside a tiny SDXL model, and what they leave behind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.models.registry import load_model
from tests import tiny
from tests.test_lora_names import published_shapes
from tests.test_training import PROPORTIONAL, ROUNDING, assert_equal_to_rounding, up_weights
from tests.tiny import largest_difference, read_log, scalars, stored
from tests.trained import check_in_diffusers, check_previews

# Diffusers on a recent NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SCRIPT = "sdxl_train_network"
PROMPTS = ("a red circle --w 32 --h 32 --s 2 --d 7", "sks --n blue --w 48 --h 32 --s 2 --l 4 --d 8")
# The tiny model's transformers, which are as deep as SDXL's second level.
TRANSFORMERS = ("input_blocks_3_1", "middle_block_1", "output_blocks_0_1", "output_blocks_1_1")
UNUSED = "lora_te1_text_model_encoder_layers_1_"  # the first encoder's last layer has no part in its answer


@pytest.fixture(scope="module")
def xl_file(model_files) -> Path:
    return model_files("sdxl")


@pytest.fixture(scope="module")
def xl_flags(flags, xl_file):
    def make(output_dir: Path, **changes: object) -> list[str]:
        return flags(output_dir, **{"pretrained_model_name_or_path": xl_file} | changes)

    return make


@pytest.fixture
def xl_run(train, xl_flags, tmp_path):
    """`xl_run(name, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, **changes: object) -> Path:
        train(xl_flags(tmp_path / name, **changes), sdxl=True)
        return tmp_path / name / "run.safetensors"

    return start


@pytest.fixture
def run(train, flags, tmp_path):
    """The same for train_network.py and the model of Stable Diffusion 1.x."""

    def start(name: str, **changes: object) -> Path:
        train(flags(tmp_path / name, **changes))
        return tmp_path / name / "run.safetensors"

    return start


@pytest.fixture(scope="module")
def work(tmp_path_factory, xl_flags, fork_server):
    """The folder of a run, and how it ended."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    words = xl_flags(
        folder / "out",
        learning_rate=0.05,
        max_train_steps=6,
        save_precision="float",
        sample_prompts=folder / "prompts.txt",
        sample_every_n_steps=6,
        logging_dir=folder / "logs",
    )
    return folder, fork_server.run(words, SCRIPT)


def weights_of(file: Path, part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in load_file(file).items() if part in key}


def test_a_run_ends_well_and_both_text_encoders_and_the_unet_have_learned(work):
    folder, ended = work
    assert ended.status == 0, ended.said
    assert "Traceback" not in ended.said
    weights = load_file(folder / "out" / "run.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    ups = {key: tensor for key, tensor in weights.items() if "lora_up" in key}
    assert {key for key, tensor in ups.items() if not tensor.any()} == {key for key in ups if key.startswith(UNUSED)}
    log = read_log(folder / "logs")
    assert len(scalars(log, "loss/current")) == 6
    assert all(np.isfinite(loss) for loss in scalars(log, "loss/current").values())
    for group in ("unet", "text_encoder_1", "text_encoder_2"):
        assert list(scalars(log, f"lr/{group}").values()) == pytest.approx([0.05] * 6)


def test_the_weights_have_sdxls_names(work):
    published = {key.split(".")[0] for key in published_shapes("sdxl", convolutional=False)}
    layers = [name.removeprefix("lora_unet_input_blocks_4_1_") for name in published if "input_blocks_4_1_" in name]
    names = {f"lora_unet_{transformer}_{layer}" for transformer in TRANSFORMERS for layer in layers}
    names |= {name for name in published if "_encoder_layers_0_" in name or "_encoder_layers_1_" in name}
    assert len(names) == 4 * (2 + 2 * 10) + 2 * 2 * 6
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    weights = load_file(work[0] / "out" / "run.safetensors")
    assert weights.keys() == {f"{name}.{part}" for name in names for part in parts}


def test_the_metadata_are_sdxls(work):
    with safe_open(work[0] / "out" / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    told = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
    }
    assert {key: metadata[key] for key in told} == told


def test_previews_are_those_of_the_saved_file(work, xl_file):
    check_previews(work[0] / "out", "000006", PROMPTS, lambda: load_model(xl_file))


def test_the_lora_paints_in_diffusers_what_it_paints_here(work, xl_file):
    check_in_diffusers(work[0] / "out" / "run.safetensors", lambda: load_model(xl_file))


def test_everything_cached_trains_as_nothing_cached(xl_run, pictures, tmp_path):
    """The files have SDXL's names and arrays."""
    data = tiny.draw_pictures(tmp_path / "data" / "1_sks shape", 3).parent
    common = {"train_data_dir": data, "network_train_unet_only": True, "max_train_steps": 3} | PROPORTIONAL
    text = {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    latents = {"cache_latents": True, "cache_latents_to_disk": True}
    fresh = xl_run("fresh", **common)
    told = xl_run("told", **common, **text)
    assert_equal_to_rounding(fresh, told)
    both = xl_run("both", **common, **text, **latents)
    assert_equal_to_rounding(both, xl_run("again", **common, **text, **latents))
    assert_equal_to_rounding(both, xl_run("memory", **common, cache_text_encoder_outputs=True, cache_latents=True))
    assert all(key.startswith("lora_unet_") for key in load_file(both))
    folder = data / "1_sks shape"
    with np.load(folder / "32_0_te_outputs.npz") as file:
        shapes = {name: file[name].shape for name in ("hidden_state1", "hidden_state2", "pool2")}
    assert shapes == {"hidden_state1": (77, 32), "hidden_state2": (77, 64), "pool2": (48,)}
    with np.load(folder / "32_0_0032x0032_sdxl.npz") as file:
        assert file["latents"].shape == (4, 16, 16)
    assert len(list(folder.glob("*.npz"))) == 6


@pytest.mark.parametrize(
    ("rates", "moved"),
    [
        (0.01, (True, True)),
        ((0.01, 0), (True, False)),
        ((0, 0.01), (False, True)),
        (0, (False, False)),
    ],
)
def test_each_text_encoder_has_its_learning_rate(xl_run, rates, moved):
    file = xl_run("a", text_encoder_lr=rates, unet_lr=0.01, max_train_steps=2)
    up = [weights_of(file, f"lora_te{number}_") for number in (1, 2)]
    found = tuple(any(tensor.any() for key, tensor in one.items() if "lora_up" in key) for one in up)
    assert found == moved
    assert any(tensor.any() for key, tensor in weights_of(file, "lora_unet_").items() if "lora_up" in key)


def test_gradient_checkpointing_changes_nothing(xl_run):
    common = {"network_dropout": 0.2, "max_train_steps": 2, **PROPORTIONAL}
    assert_equal_to_rounding(xl_run("kept", **common), xl_run("recomputed", **common, gradient_checkpointing=True))


def test_bf16_computes_roughly_and_trains_exactly(xl_run):
    common = PROPORTIONAL | {"max_train_steps": 2}
    exact = up_weights(xl_run("exact", **common))
    rough = up_weights(xl_run("rough", mixed_precision="bf16", save_precision="float", **common))
    assert 0 < (exact - rough).norm() < 0.1 * exact.norm()


def test_v_prediction_is_trained_towards_on_request(xl_run):
    common = PROPORTIONAL | {"max_train_steps": 1}
    noise = xl_run("noise", **common)
    velocity = xl_run("velocity", v_parameterization=True, zero_terminal_snr=True, **common)
    assert largest_difference(noise, velocity) > 1e-4
    with safe_open(velocity, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == "True"


def test_where_a_picture_was_cut_changes_what_is_learned(xl_run, run, tmp_path):
    """The same pixels once whole and once cut out of larger pictures: only SDXL is told."""
    whole = tiny.draw_pictures(tmp_path / "whole" / "1_sks", 2)
    framed = tmp_path / "framed" / "1_sks"
    framed.mkdir(parents=True)
    for path in whole.glob("*.png"):
        frame = Image.new("RGB", (48, 32), "white")
        frame.paste(Image.open(path), (8, 0))
        frame.save(framed / path.name)
        (framed / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    common = {"max_train_steps": 1, **PROPORTIONAL}
    folders = {"whole": whole.parent, "framed": framed.parent}
    told = [xl_run(f"xl {name}", train_data_dir=folder, **common) for name, folder in folders.items()]
    untold = [run(name, train_data_dir=folder, **common) for name, folder in folders.items()]
    assert largest_difference(*told) > 10 * ROUNDING
    assert stored(untold[0]) == stored(untold[1])


def test_two_processes_equal_one_with_twice_the_accumulation(xl_run, xl_flags, fork_server, tmp_path):
    """Also where a text encoder's last layer is in no graph."""
    common = {"network_dropout": 0.2, "max_train_steps": 2, **PROPORTIONAL}
    ended = fork_server.run(xl_flags(tmp_path / "two", **common), SCRIPT, processes=2)
    assert ended.status == 0, ended.said
    assert ", 2 processes" in ended.said
    one = xl_run("one", gradient_accumulation_steps=2, **common)
    assert_equal_to_rounding(tmp_path / "two" / "run.safetensors", one)
