"""tools/convert_diffusers20_original_sd.py there and back, and what it refuses."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from library import cli
from library.models.files.checkpoint import open_weights
from library.options.base import options_of
from library.options.convert import ConvertOptions
from tests.processes import run
from tests.tiny import make_model
from tools.convert_diffusers20_original_sd import main, named

SCRIPT = "tools/convert_diffusers20_original_sd.py"


def convert(*words):
    return run([sys.executable, SCRIPT, *words], 120, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for family in ("sd2", "sdxl"):
        model = make_model(family)
        model.carried["alphas_cumprod"] = torch.rand(1000)
        model.save(folder / f"{family}.safetensors", metadata={"modelspec.title": "mine", "sshs_model_hash": "1"})
    return folder


def test_there_and_back_is_the_same_model(files, tmp_path):
    there = convert(files / "sdxl.safetensors", tmp_path / "folder", "--use_safetensors")
    assert there.returncode == 0, there.stderr
    assert there.stdout == f"{tmp_path / 'folder'} written\n"
    assert not list(tmp_path.rglob("*.bin"))
    words = ("--metadata", '{"note": "x", "n": 1}', "--global_step", "7")
    back = convert(*words, tmp_path / "folder", tmp_path / "back.safetensors")
    assert (back.returncode, back.stderr) == (0, "")
    one, other = load_file(files / "sdxl.safetensors"), load_file(tmp_path / "back.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with open_weights(tmp_path / "back.safetensors") as file:
        told = {"modelspec.title": "mine", "note": "x", "n": "1", "ss_epoch": "0", "ss_steps": "7"}
        assert {name: text for name, text in file.metadata.items() if "hash" not in name} == told


def test_precisions_steps_and_a_reference(files, tmp_path):
    result = convert(files / "sd2.safetensors", tmp_path / "half.ckpt", "--v2", "--bf16", "--epoch=3")
    assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 0)
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.bfloat16, torch.float32}
    reference = tmp_path / "reference"
    assert convert(files / "sd2.safetensors", reference).returncode == 0
    assert (reference / "unet/diffusion_pytorch_model.bin").is_file()
    (reference / "scheduler/scheduler_config.json").write_text('{"_class_name": "LMSDiscreteScheduler"}')
    words = ("--reference_model", reference, "--save_precision_as", "fp16", "--use_safetensors")
    result = convert(tmp_path / "half.ckpt", tmp_path / "folder", *words)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text()) == {
        "_class_name": "LMSDiscreteScheduler"
    }
    weights = load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/sdxl.safetensors", "{}/x", "--v1"], "--v1: {}/sdxl.safetensors is a SDXL model, leave the flag out"),
        (["{}/sdxl.safetensors", "{}/sdxl.safetensors"], "is the model to load"),
        (["{}/sdxl.safetensor", "{}/x"], "did you mean {}/sdxl.safetensors?"),
        (["{}/sdxl.safetensors"], "give two names"),
        (["a", "b", "c"], "'c' belongs to no option"),
        (["a", "b", "--metadata", "title"], "--metadata: title is no JSON object"),
        (["a", "b", "--fp16", "--bf16"], "--fp16 and --bf16: weights are loaded in one format"),
    ],
)
def test_mistakes_are_said_in_one_sentence(files, fresh_console, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *(word.format(files) for word in words)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said.format(files) in message
    assert len(message.splitlines()) == 1


def test_flags_are_those_that_scripts_use():
    booleans = {"v1", "v2", "unet_use_linear_projection", "fp16", "bf16", "float", "use_safetensors"}
    texts = {"save_precision_as", "epoch", "global_step", "metadata", "variant", "reference_model"}
    options = {option.name: option.kind for option in options_of(ConvertOptions)}
    assert options.keys() - {"model_to_load", "model_to_save"} == booleans | texts
    assert {name for name, kind in options.items() if kind is bool} == booleans


def test_names_may_stand_between_flags():
    words = ["--v1", "--model_to_load", "a", "--epoch", "3", "--model_to_save", "b"]
    assert named(["--v1", "a", "--epoch", "3", "b"]) == words
