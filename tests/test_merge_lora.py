"""networks/merge_lora.py and sdxl_merge_lora.py: networks that become part of a model, and what is refused."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library import cli
from library.generation.prompts import PromptLine
from library.generation.samplers import make_scheduler
from library.lora.merging import merge_into_model
from library.lora.names import named_modules
from library.lora.sources import Addition
from library.models.diffusers_writer import write_folder
from library.models.files.checkpoint import hash_file, open_weights, write_tensors
from library.models.noise import Prediction
from library.models.prediction import prediction_of
from library.models.registry import inspect_model, load_model
from library.models.sgm_keys import UNET_PREFIX
from networks.lora import create_network_from_weights
from tests.pipelines import picture_of, pipeline_of
from tests.processes import python
from tests.random_networks import assert_rounded, expected, random_lora
from tests.tiny import make_model, stored

SCRIPTS = {"sd1": "merge_lora", "sd2": "merge_lora", "sdxl": "sdxl_merge_lora"}
FORMATS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
REQUEST = PromptLine("sks, a red circle", "blue", width=32, height=48, seed=3, scale=5.0, sample_steps=4)


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("loras")

    def make(family: str, rank: int = 4, seed: int = 1, metadata: dict[str, str] | None = None, **more) -> Path:
        path = folder / f"{family}_{rank}_{seed}_{len(list(folder.iterdir()))}.safetensors"
        write_tensors(path, random_lora(family, rank, seed, **more), None, metadata)
        return path

    return make


@pytest.fixture(scope="module")
def lora(loras) -> Path:
    """For the tiny model of Stable Diffusion 1.x, without convolutions."""
    return loras("sd1", kernels=False)


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """The script for a family, in this process."""

    def call(family: str, *words: object) -> None:
        script = importlib.import_module(f"networks.{SCRIPTS[family]}")
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        cli.run(script.main)

    return call


@pytest.mark.parametrize(
    ("family", "saved"), [("sd1", "float"), ("sd2", "fp16"), ("sdxl", "bf16"), ("sd2", "float"), ("sdxl", "float")]
)
def test_two_networks_are_added_to_within_rounding(tool, model_files, loras, tmp_path, family, saved, capsys):
    """Of every layer: text encoders whose queries, keys and values are one tensor, and convolutions."""
    output = tmp_path / "out.safetensors"
    files = loras(family, 4, 1), loras(family, 3, 2)
    words = ["--sd_model", model_files(family), "--models", *files, "--ratios", 0.8, -0.3, "--save_precision", saved]
    tool(family, *words, "--save_to", output)
    wanted = expected(family, (load_file(files[0]), 0.8), (load_file(files[1]), -0.3))
    assert_rounded(load_file(output), wanted, FORMATS[saved])
    said = capsys.readouterr()
    assert said.out == f"{output} written\n"
    assert f"{files[0].name}: found in the model" in said.err
    assert ("text encoder 2" in said.err) == (family == "sdxl")


def test_precision_is_of_what_is_saved_alone(tool, model_file, lora, tmp_path):
    words = ["--sd_model", model_file, "--models", lora]
    tool("sd1", *words, "--save_to", tmp_path / "a.safetensors", "--precision", "bf16")
    tool("sd1", *words, "--save_to", tmp_path / "b.safetensors", "--precision", "fp16", "--save_precision", "bf16")
    assert stored(tmp_path / "a.safetensors") == stored(tmp_path / "b.safetensors")
    assert_rounded(load_file(tmp_path / "a.safetensors"), expected("sd1", (load_file(lora), 1.0)), torch.bfloat16)


def test_ckpt_and_diffusers_folder_in_and_out(tool, model_file, lora, tmp_path):
    model = load_model(model_file)
    model.save(tmp_path / "in.ckpt")
    write_folder(model, tmp_path / "in")
    ways = (("in", "out.safetensors"), ("in.ckpt", "out"), (model_file, "out.ckpt"))
    for source, target in ways:
        words = ("--models", lora, "--ratios", 0.5, "--save_precision", "fp16")
        tool("sd1", "--sd_model", tmp_path / source, "--save_to", tmp_path / target, *words)
    wanted = load_file(tmp_path / "out.safetensors")
    assert_rounded(wanted, expected("sd1", (load_file(lora), 0.5)), torch.float16)
    pickled = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    for ours in (pickled, dict(inspect_model(tmp_path / "out").load(None).tensors())):
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_a_merged_model_paints_what_model_and_network_paint(tool, model_file, lora, tmp_path):
    output = tmp_path / "out.safetensors"
    tool("sd1", "--sd_model", model_file, "--models", lora, "--ratios", 6, "--save_to", output)
    scheduler = make_scheduler("ddim", load_model(model_file).noise_process())
    plain, merged = (picture_of(pipeline_of(load_model(path), scheduler), REQUEST) for path in (model_file, output))
    beside = pipeline_of(load_model(model_file), scheduler)
    beside.load_lora_weights(str(lora), adapter_name="a")
    beside.set_adapters(["a"], [6.0])
    ours = load_model(model_file)
    points = ours.attach_points()
    network, weights = create_network_from_weights(6.0, lora, None, points.text_encoder, points.unet)
    network.apply_to(points.text_encoder, points.unet)
    network.load_state_dict(weights)
    assert np.abs(merged - plain).mean() > 4, "the network must be seen for its picture to be compared"
    assert np.abs(merged - picture_of(beside, REQUEST)).mean() < 0.2
    assert np.abs(merged - picture_of(pipeline_of(ours, scheduler), REQUEST)).mean() < 0.2


def test_threads_change_nothing(tool, model_files, loras, tmp_path):
    words = ["--sd_model", model_files("sd2"), "--models", loras("sd2", 7), loras("sd2", 5, 3)]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        tool("sd2", *words, "--save_to", tmp_path / f"{count}.safetensors")
        tool("sd2", *words, "--save_to", tmp_path / f"{count}")
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    for name in ("{}.safetensors", "{}/unet/diffusion_pytorch_model.safetensors"):
        assert len({stored(tmp_path / name.format(count)) for count in (1, 2)}) == 1


def test_norms_and_biases_are_changed_too(tool, model_files, tmp_path):
    """As LyCORIS trains them, also where a bias is a part of a tensor."""
    model = make_model("sd2")
    layers = named_modules(model.attach_points())
    norm, linear = "lora_unet_conv_norm_out", "lora_te_text_model_encoder_layers_1_self_attn_k_proj"
    one, other = torch.randn(3, 32), torch.randn(64, 64)
    tensors = {
        **{f"{norm}.{part}": tensor for part, tensor in zip(("w_norm", "b_norm"), one, strict=False)},
        **{f"{linear}.{part}": tensor for part, tensor in (("diff", other), ("diff_b", other[0]))},
    }
    write_tensors(tmp_path / "in.safetensors", tensors)
    words = ("--models", tmp_path / "in.safetensors", "--ratios", 0.5, "--save_to", tmp_path / "out.safetensors")
    tool("sd2", "--sd_model", model_files("sd2"), *words)
    with torch.no_grad():
        for name, weight, bias in ((norm, one[0], one[1]), (linear, other, other[0])):
            layers[name].weight += 0.5 * weight
            layers[name].bias += 0.5 * bias
    assert_rounded(load_file(tmp_path / "out.safetensors"), dict(model.tensors()), torch.float32)


class Halves:
    """Half as strong in the U-Net, not at all elsewhere."""

    values = (0.0, 0.5)

    def of(self, lora_name: str) -> float:
        return 0.5 if lora_name.startswith("lora_unet") else 0.0


def test_block_weights_count(model_file, lora, tmp_path, fresh_console):
    output = tmp_path / "out.safetensors"
    merge_into_model(inspect_model(model_file), [Addition(lora, 0.6, Halves())], output, torch.float32)
    tensors = {key: tensor for key, tensor in load_file(lora).items() if key.startswith("lora_unet")}
    assert_rounded(load_file(output), expected("sd1", (tensors, 0.3)), torch.float32)
    with open_weights(output) as file:
        assert json.loads(file.metadata["sd_merge_recipe"])["block_weights"] == [[0.0, 0.5]]


def test_what_a_file_says_of_itself(tool, loras, tmp_path):
    model, output = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    told = {"modelspec.resolution": "512x768", "modelspec.title": "theirs", "ss_seed": "1"}
    make_model("sd1").save(model, metadata=told)
    file = loras("sd1", kernels=False)
    words = ["--sd_model", model, "--models", file, "--ratios", 0.25, "--save_to", output]
    tool("sd1", *words)
    with open_weights(output) as merged:
        found = merged.metadata
        merged.verify()
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert (found["modelspec.prediction_type"], found["modelspec.resolution"]) == ("epsilon", "512x768")
    assert (found["modelspec.title"], found["modelspec.merged_from"]) == ("out", f"model, {file.stem}")
    recipe, sources = json.loads(found["sd_merge_recipe"]), json.loads(found["sd_merge_models"])
    assert recipe["ratios"] == [1.0, 0.25]
    assert recipe["models"] == [hash_file(path).sha256 for path in (model, file)]
    assert [sources[hash]["name"] for hash in recipe["models"]] == [model.name, file.name]
    assert str(tmp_path) not in str(found)
    assert "ss_seed" not in found
    tool("sd1", *words, "--no_metadata")
    with open_weights(output) as merged:
        assert {name.removeprefix("modelspec.") for name in merged.metadata} == {
            "architecture", "hash_sha256", "prediction_type", "resolution", "sai_model_spec"
        }  # fmt: skip


def test_what_a_folder_predicts_goes_into_the_file(tool, loras, tmp_path):
    model = make_model("sd2")
    model.prediction = Prediction("v_prediction", zero_terminal_snr=True)
    write_folder(model, tmp_path / "in")
    words = ["--sd_model", tmp_path / "in", "--models", loras("sd2"), "--v2"]
    for target in ("out.ckpt", "out.safetensors", "out"):
        tool("sd2", *words, "--save_to", tmp_path / target)
        assert inspect_model(tmp_path / target).prediction == model.prediction
    with open_weights(tmp_path / "out.safetensors") as file:
        assert prediction_of(file) == model.prediction


def test_averaged_weights_are_left_out_and_integers_stay(tool, model_file, lora, tmp_path, capsys):
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    more = {"model_ema.decay": torch.ones(3), positions: torch.arange(77)[None] * 3}
    write_tensors(tmp_path / "in.safetensors", load_file(model_file) | more)
    output = tmp_path / "out.safetensors"
    words = ("--save_to", output, "--save_precision", "fp16")
    tool("sd1", "--sd_model", tmp_path / "in.safetensors", "--models", lora, *words)
    merged = load_file(output)
    assert "model_ema.decay" not in merged
    assert torch.equal(merged[positions], more[positions])
    assert "1 tensors of training (averaged weights, losses) are left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_numbers_too_large_for_the_format_are_told(tool, model_file, lora, tmp_path, name, capsys):
    words = ("--ratios", 1e7, "--save_precision", "fp16", "--save_to", tmp_path / name)
    tool("sd1", "--sd_model", model_file, "--models", lora, *words)
    assert "hold values that are not finite, or too large for the number format" in capsys.readouterr().err


# What stays whole


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_the_old_file(model_file, lora, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    done = python(
        f"""
        import os, signal, sys
        from library import cli
        from library.models.files.safetensors_file import SafetensorsFile
        from networks import merge_lora
        read, reads = SafetensorsFile.get, []

        def get(self, key, dtype=None):
            reads.append(key)
            if self.path.name == "tiny.safetensors" and len(reads) > 400:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, key, dtype)

        SafetensorsFile.get = get
        sys.argv = ["", "--sd_model", {str(model_file)!r}, "--models", {str(lora)!r}, "--save_to", {str(output)!r}]
        cli.run(merge_lora.main)
        """
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert output.read_bytes() == b"old"
    (left,) = set(tmp_path.iterdir()) - {output}
    assert left.suffix == ".tmp"


@pytest.mark.parametrize("broken", ["model", "network"])
def test_a_disk_that_cannot_be_read(mistake, model_file, lora, tmp_path, monkeypatch, broken):
    output, path = tmp_path / "out.safetensors", model_file if broken == "model" else lora
    output.write_bytes(b"old")
    reader = type(open_weights(model_file))
    read, reads = reader.get, []

    def get(self, key, dtype=None):
        reads.extend([key] if self.path == path else [])
        if len(reads) == 250:
            raise OSError(5, "Input/output error")
        return read(self, key, dtype)

    monkeypatch.setattr(reader, "get", get)
    words = ("--sd_model", model_file, "--models", lora, "--save_to", output)
    assert f"{path} cannot be read: Input/output error" in mistake("sd1", *words)
    assert output.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt", "out"])
def test_a_full_disk(mistake, model_file, lora, tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("may not mount a disk")
    try:
        sentence = mistake("sd1", "--sd_model", model_file, "--models", lora, "--save_to", disk / name)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "cannot be written: No space left on device" in sentence


# Mistakes


def test_outputs_that_cannot_be(mistake, model_file, lora, tmp_path):
    words = ("--sd_model", model_file, "--models", lora, "--save_to")
    for path in (model_file, lora):
        before = path.read_bytes()
        assert f"--save_to: {path} is one of the files to read" in mistake("sd1", *words, path)
        assert path.read_bytes() == before
    write_folder(load_model(model_file), tmp_path / "folder")
    folder = ("--sd_model", tmp_path / "folder", "--models", lora, "--save_to", tmp_path / "folder")
    assert "is one of the folders to read" in mistake("sd1", *folder)
    assert "which is read" in mistake("sd1", *folder[:-1], tmp_path / "folder" / "new")
    assert "did you mean" in mistake("sd1", *words, tmp_path / "out.safetensor")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert "which would be lost" in mistake("sd1", *words, tmp_path / "other")


def test_files_that_are_missing_or_broken(mistake, model_file, lora, tmp_path):
    output = ("--save_to", tmp_path / "out.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora.read_bytes()[:-100])
    model = ("--sd_model", model_file, *output)
    assert "its last 100 bytes are missing" in mistake("sd1", *model, "--models", lora, cut)
    missing = tmp_path / "cud.safetensors"
    assert f"{missing} does not exist, did you mean" in mistake("sd1", *model, "--models", missing)
    missing = ("--sd_model", tmp_path / "no.ckpt", *output, "--models", lora)
    assert "--sd_model: " in mistake("sd1", *missing)
    assert "is a LoRA, not a model" in mistake(
        "sd1", "--sd_model", lora, *output, "--models", cut.with_name("cut.safetensors")
    )
    assert "is no network's file" in mistake("sd1", *model, "--models", model_file)
    broken = load_file(lora)
    broken[f"{ATTENTION}.lora_up.weight"][0, 0] = torch.nan
    write_tensors(tmp_path / "nan.safetensors", broken)
    sentence = mistake("sd1", *model, "--models", tmp_path / "nan.safetensors")
    assert f"changes {ATTENTION} by numbers that are not finite, in its lora_up.weight" in sentence


def test_damage_is_found_first(mistake, lora, tmp_path):
    model = tmp_path / "model.safetensors"
    make_model("sd1").save(model)
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    model.write_bytes(content)
    words = ("--sd_model", model, "--models", lora, "--save_to", tmp_path / "out.safetensors")
    assert f"{model} is damaged" in mistake("sd1", *words)


def test_networks_and_models_of_different_families(mistake, model_files, loras, tmp_path):
    output = ("--save_to", tmp_path / "out.safetensors")
    one = loras("sd1", metadata={"ss_base_model_version": "sd_v1"})
    sentence = mistake("sdxl", "--sd_model", model_files("sdxl"), "--models", one, *output)
    assert f"{one} is for Stable Diffusion 1.x and {model_files('sdxl')} is an SDXL model" in sentence
    xl = loras("sdxl")
    assert f"{xl} is for SDXL and" in mistake("sd1", "--sd_model", model_files("sd1"), "--models", xl, *output)
    words = ("--models", xl, *output)
    assert "is an SDXL model: use networks/sdxl_merge_lora.py" in mistake(
        "sd1", "--sd_model", model_files("sdxl"), *words
    )
    assert "model: use networks/merge_lora.py" in mistake("sdxl", "--sd_model", model_files("sd1"), *words)
    assert "drop --v2" in mistake("sd1", "--sd_model", model_files("sd1"), "--models", one, "--v2", *output)


def test_layers_that_do_not_fit_stop_it_unless_they_may_be_left_out(mistake, tool, model_file, lora, tmp_path, capsys):
    tensors = load_file(lora)
    foreign = {key.replace(ATTENTION, "lora_unet_nowhere"): value for key, value in tensors.items() if ATTENTION in key}
    wide = {f"{ATTENTION}.lora_down.weight": torch.ones(4, 9)}
    write_tensors(tmp_path / "in.safetensors", tensors | foreign | wide)
    output = tmp_path / "out.safetensors"
    words = ("--sd_model", model_file, "--models", tmp_path / "in.safetensors", "--save_to", output)
    sentence = mistake("sd1", *words)
    assert "has 2 layers that do not fit" in sentence
    assert f"{ATTENTION} (for a weight of 32 x 9, not 32 x 32), lora_unet_nowhere" in sentence
    tool("sd1", *words, "--allow_partial")
    said = capsys.readouterr().err
    assert "2 layers do not fit the model and are left out" in said
    rest = {key: value for key, value in tensors.items() if not key.startswith(f"{ATTENTION}.")}
    assert_rounded(load_file(output), expected("sd1", (rest, 1.0)), torch.float32)
    write_tensors(tmp_path / "foreign.safetensors", foreign)
    words = ("--sd_model", model_file, "--models", tmp_path / "foreign.safetensors", "--allow_partial")
    assert "has no layer that" in mistake("sd1", *words, "--save_to", tmp_path / "none.safetensors")


def test_flags_for_networks_alone_are_told_to_have_no_effect(tool, model_file, lora, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    tool("sd1", "--sd_model", model_file, "--models", lora, "--save_to", output, "--concat", "--shuffle")
    assert "--concat and --shuffle have no effect" in capsys.readouterr().err
    with safe_open(output, "pt") as file:
        assert any(name.startswith(UNET_PREFIX) for name in file.keys())  # noqa: SIM118


def test_a_ratio_of_0_changes_nothing(tool, model_file, lora, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    tool("sd1", "--sd_model", model_file, "--models", lora, "--ratios", 0, "--save_to", output)
    assert "\n0 of the model's" in capsys.readouterr().err
    assert_rounded(load_file(output), expected("sd1"), torch.float32)
