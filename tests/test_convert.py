"""tools/convert_diffusers20_original_sd.py there and back, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import cli
from library.errors import UserError
from library.models.diffusers_writer import write_folder
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.noise import Prediction
from library.models.registry import inspect_model
from library.options.base import options_of
from library.options.convert import ConvertOptions
from tests.processes import run
from tests.tiny import make_model
from tools.convert_diffusers20_original_sd import main

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


def convert_here(monkeypatch, *words):
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
    main()


def test_there_and_back_is_the_same_model(files, tmp_path, monkeypatch, fresh_console, capsys):
    there = convert(files / "sdxl.safetensors", tmp_path / "folder", "--use_safetensors")
    assert there.returncode == 0, there.stderr
    assert there.stdout == f"{tmp_path / 'folder'} written\n"
    assert not list(tmp_path.rglob("*.bin"))
    words = ("--metadata", '{"note": "x", "n": 1}', "--global_step", "7")
    convert_here(monkeypatch, *words, tmp_path / "folder", tmp_path / "back.safetensors")
    assert not capsys.readouterr().err
    one, other = load_file(files / "sdxl.safetensors"), load_file(tmp_path / "back.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with open_weights(tmp_path / "back.safetensors") as file:
        told = {"modelspec.title": "mine", "note": "x", "n": "1", "ss_epoch": "0", "ss_steps": "7"}
        told |= {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.prediction_type": "epsilon"}
        assert told.items() <= file.metadata.items()
        assert file.metadata["modelspec.implementation_version"].startswith("atelier")
        file.verify()


def test_values_too_large_for_the_format_are_told_of(tmp_path, monkeypatch, fresh_console, capsys):
    model = make_model()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = 1e6
    model.carried["alphas_cumprod"] = torch.full((1000,), 1e6)  # nobody reads it
    model.save(tmp_path / "large.safetensors")
    words = (tmp_path / "large.safetensors", tmp_path / "small.safetensors", "--save_precision_as")
    convert_here(monkeypatch, *words, "fp16")
    assert "1 tensors hold values that are too large for --save_precision_as fp16, use float or bf16: vae.decoder" in (
        capsys.readouterr().err
    )
    convert_here(monkeypatch, *words, "bf16")
    assert "too large" not in capsys.readouterr().err


def test_precisions_steps_and_a_reference(files, tmp_path, monkeypatch, fresh_console):
    convert_here(monkeypatch, files / "sd2.safetensors", tmp_path / "half.ckpt", "--v2", "--bf16", "--epoch=3")
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 0)
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.bfloat16, torch.float32}
    reference = tmp_path / "reference"
    convert_here(monkeypatch, files / "sd2.safetensors", reference)
    assert (reference / "unet/diffusion_pytorch_model.bin").is_file()
    (reference / "scheduler/scheduler_config.json").write_text("{}")
    index = json.loads((reference / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LMSDiscreteScheduler"]
    (reference / "model_index.json").write_text(json.dumps(index))
    words = ("--reference_model", reference, "--save_precision_as", "fp16", "--use_safetensors")
    convert_here(monkeypatch, tmp_path / "half.ckpt", tmp_path / "folder", *words)
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LMSDiscreteScheduler"]
    weights = load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.fixture(scope="module")
def repository(files, tmp_path_factory):
    """A folder in Diffusers' layout with the single file in it, as on the hub."""
    folder = tmp_path_factory.mktemp("repository") / "repo"
    write_folder(make_model("sd2"), folder, safetensors=False)
    return folder


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("repo/v2.safetensors", "repo"),
        ("repo/link.safetensors", "repo"),
        ("repo", "."),
        ("repo.tmp/v2.safetensors", "repo"),
        ("repo.replaced.tmp", "repo"),
    ],
)
def test_the_model_that_is_read_is_not_removed(files, repository, tmp_path, monkeypatch, source, target):
    folder = tmp_path / source.split("/")[0]
    shutil.copytree(repository, folder)
    shutil.copy(files / "sd2.safetensors", folder / "v2.safetensors")
    (folder / "link.safetensors").symlink_to(files / "sd2.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"writing it would remove {tmp_path / source}"):
        convert_here(monkeypatch, tmp_path / source, tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_reference_is_not_removed(files, repository, tmp_path, monkeypatch):
    shutil.copytree(repository, tmp_path / "repo")
    with pytest.raises(UserError, match=f"{tmp_path / 'repo'} is one of the folders to read"):
        convert_here(monkeypatch, files / "sd2.safetensors", tmp_path / "repo", "--reference_model", tmp_path / "repo")


def test_the_weights_that_are_asked_for_are_read(repository, tmp_path, monkeypatch):
    folder = shutil.copytree(repository, tmp_path / "repo")
    path = folder / "unet/diffusion_pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, path.with_suffix(".fp16.bin"))
    for variant, more in (("fp16", 1), ("bf16", 0)):
        convert_here(monkeypatch, folder, tmp_path / "file.safetensors", "--variant", variant)
        with open_weights(tmp_path / "file.safetensors") as file:
            bias = file.get("model.diffusion_model.out.2.bias")
        assert torch.equal(bias, tensors["conv_out.bias"] + more)


def test_a_damaged_model_is_not_converted(files, tmp_path, monkeypatch):
    content = bytearray((files / "sd2.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        convert_here(monkeypatch, tmp_path / "damaged.safetensors", tmp_path / "folder")


def test_a_model_that_says_nothing_can_be_said_to_predict_v(tmp_path, monkeypatch, fresh_console, capsys):
    model = make_model("sd2")
    for name, parameter in model.unet.named_parameters():
        if name.startswith("up_blocks.1.attentions") and name.endswith("transformer_blocks.0.norm1.bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    write_tensors(tmp_path / "silent.safetensors", model.tensors())
    convert_here(monkeypatch, tmp_path / "silent.safetensors", tmp_path / "folder")
    assert "add --v_parameterization" in capsys.readouterr().err
    assert inspect_model(tmp_path / "folder").prediction == Prediction()
    words = (tmp_path / "silent.safetensors", tmp_path / "folder", "--v_parameterization")
    convert_here(monkeypatch, *words)
    assert capsys.readouterr().err == ""
    assert inspect_model(tmp_path / "folder").prediction == Prediction("v_prediction")
    convert_here(monkeypatch, tmp_path / "folder", tmp_path / "again.ckpt")
    assert inspect_model(tmp_path / "again.ckpt").prediction == Prediction("v_prediction")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/sdxl.safetensors", "{}/x", "--v1"], "--v1: {}/sdxl.safetensors is an SDXL model, leave the flag out"),
        (["{}/sdxl.safetensors", "{}/sdxl.safetensors"], "is one of the files to read"),
        (["{}/sdxl.safetensor", "{}/x"], "did you mean {}/sdxl.safetensors?"),
        (["{}/sdxl.safetensors"], "required: model_to_save"),
        (["a", "b", "c"], "'c' belongs to no option"),
        (["a", "b", "--metadata", "title"], "--metadata: title is no JSON object"),
        (["a", "{}/b.safetensor"], "would be a folder, did you mean {}/b.safetensors?"),
        (["a", "{}/b.CKP"], "would be a folder, did you mean {}/b.ckpt?"),
        (["{}/sdxl.safetensors", "{}/sd2.safetensors", "--vae", "{}/sd2.safetensors"], "is one of the files to read"),
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


@pytest.mark.parametrize("name", ["model-v1.5", "model.fp16", "model.v", "model", "my.mix", "model.safetensors"])
def test_folders_may_have_dots_in_their_names(name):
    options = cli.parse((ConvertOptions,), ["a", name], description="")[ConvertOptions]
    assert options.to_file == (name == "model.safetensors")


def test_an_autoencoder_of_ones_own(files, repository, tmp_path, monkeypatch):
    """For a model that has none, and without being removed with the folder that it lies in."""
    other, prefix = make_model("sd2", vae_config={"block_out_channels": (32, 64)}).tensors(), "first_stage_model."
    with open_weights(files / "sd2.safetensors") as file:
        bare = {key: file.get(key) for key in file.keys() if not key.startswith(prefix)}  # noqa: SIM118 - no mapping
    write_tensors(tmp_path / "bare.safetensors", bare)
    write_tensors(tmp_path / "vae.safetensors", {key: other[key] for key in other if key.startswith(prefix)})
    with pytest.raises(UserError, match="name a file that has one with --vae"):
        convert_here(monkeypatch, tmp_path / "bare.safetensors", tmp_path / "out.safetensors")
    words = ("--vae", tmp_path / "vae.safetensors")
    convert_here(monkeypatch, tmp_path / "bare.safetensors", tmp_path / "out.safetensors", *words)
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == bare.keys() | {key for key in other if key.startswith(prefix)}
    assert all(torch.equal(out[key], other[key]) for key in other if key.startswith(prefix))
    folder = shutil.copytree(repository, tmp_path / "repo")
    with pytest.raises(UserError, match=f"would remove {folder / 'vae'}"):
        convert_here(monkeypatch, files / "sd2.safetensors", folder, "--vae", folder / "vae")


def test_metadata_survive_a_folder_of_pickles(files, tmp_path, monkeypatch):
    convert_here(monkeypatch, files / "sd2.safetensors", tmp_path / "folder")
    convert_here(monkeypatch, tmp_path / "folder", tmp_path / "back.safetensors")
    with open_weights(tmp_path / "back.safetensors") as file:
        assert file.metadata["modelspec.title"] == "mine"
        assert "sshs_model_hash" not in file.metadata


def test_a_variant_that_is_nowhere_is_said(repository, tmp_path, monkeypatch, fresh_console, capsys):
    folder = shutil.copytree(repository, tmp_path / "repo")
    path = folder / "unet/diffusion_pytorch_model.bin"
    shutil.copy(path, path.with_suffix(".fp16.bin"))
    for variant, said in (("fp16", 0), ("fp61", 1)):
        convert_here(monkeypatch, folder, tmp_path / "file.safetensors", "--variant", variant)
        assert capsys.readouterr().err.count(f"--variant {variant}: {folder} has no such weights") == said


def test_flags_are_those_that_scripts_use():
    booleans = {"v1", "v2", "unet_use_linear_projection", "fp16", "bf16", "float", "use_safetensors"}
    booleans |= {"v_parameterization"}  # of ours
    texts = {"save_precision_as", "epoch", "global_step", "metadata", "variant", "reference_model"}
    texts |= {"vae"}  # of ours
    options = {option.name: option.kind for option in options_of(ConvertOptions)}
    assert options.keys() - {"model_to_load", "model_to_save"} == booleans | texts
    assert {name for name, kind in options.items() if kind is bool} == booleans


def test_names_may_stand_between_flags():
    options = cli.parse((ConvertOptions,), ["--v1", "a", "--epoch", "3", "b"], description="")[ConvertOptions]
    assert (options.model_to_load, options.model_to_save, options.epoch) == ("a", Path("b"), 3)
