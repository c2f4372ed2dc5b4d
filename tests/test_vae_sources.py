"""--vae: where the autoencoder of a model may come from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from library.models import registry
from library.models.diffusers_writer import write_folder
from library.models.files.checkpoint import hash_file, open_weights, write_tensors
from library.models.registry import inspect_model
from library.models.sgm_keys import VAE_PREFIX
from tests import tiny

WIDE = {"vae_config": {"block_out_channels": (32, 64)}}


def all_of(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return file.tensors()


@pytest.fixture(scope="module")
def other() -> dict[str, Tensor]:
    """An autoencoder of another size than the models' own, under its names in a complete file."""
    tensors = tiny.make_model(**WIDE).tensors()
    return {key: tensor for key, tensor in tensors.items() if key.startswith(VAE_PREFIX)}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    write_tensors(path, tensors)
    return path


def complete_file(folder: Path, other: dict[str, Tensor]) -> Path:
    return tiny.save_model(folder / "complete.safetensors", "sd2", **WIDE)


def original_file(folder: Path, other: dict[str, Tensor]) -> Path:
    named = {key.removeprefix(VAE_PREFIX): tensor for key, tensor in other.items()}
    return write(folder / "vae.safetensors", named | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(1)})


def diffusers_file(folder: Path, other: dict[str, Tensor]) -> Path:
    return write(folder / "diffusion_pytorch_model.safetensors", tiny.make_model(**WIDE).vae.state_dict())


def older_diffusers_file(folder: Path, other: dict[str, Tensor]) -> Path:
    """Attention as Diffusers called it until version 0.15."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in tiny.make_model(**WIDE).vae.state_dict().items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[key] = tensor
    assert any(".query." in key for key in tensors)
    return write(folder / "older.safetensors", tensors)


def pickled_file(folder: Path, other: dict[str, Tensor]) -> Path:
    named = {key.removeprefix(VAE_PREFIX): tensor for key, tensor in other.items()}
    torch.save({"epoch": 3, "state_dict": named | {"loss.logvar": torch.zeros(())}}, folder / "vae.ckpt")
    return folder / "vae.ckpt"


SOURCES = (complete_file, original_file, diffusers_file, older_diffusers_file, pickled_file)


@pytest.mark.parametrize("source", SOURCES)
def test_the_autoencoder_comes_from_the_other_file(tmp_path, model_files, other, source):
    path = source(tmp_path, other)
    own, info = inspect_model(model_files("sd1")), inspect_model(model_files("sd1"), path)
    tensors = info.load().tensors()
    assert tensors.keys() == own.load().tensors().keys() | other.keys()
    assert all(torch.equal(tensors[key], other[key]) for key in other)
    unchanged = {key: tensor for key, tensor in own.load().tensors().items() if not key.startswith(VAE_PREFIX)}
    assert all(torch.equal(tensors[key], unchanged[key]) for key in unchanged)
    assert info.vae_fingerprint != own.vae_fingerprint
    assert info.text_fingerprint == own.text_fingerprint
    assert (info.hashes, info.vae_hashes) == (own.hashes, hash_file(path))
    alone = info.load_vae().components()["vae"].module
    whole = info.load().vae.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in alone.state_dict().items())


def test_all_sources_are_the_same_autoencoder(tmp_path, model_files, other):
    """Latents cached with one are good for the others."""
    found = {inspect_model(model_files("sd1"), source(tmp_path, other)).vae_fingerprint for source in SOURCES}
    assert len(found) == 1


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_file_without_an_autoencoder_needs_one(tmp_path, model_files, other, family):
    tensors = {key: tensor for key, tensor in all_of(model_files(family)).items() if not key.startswith(VAE_PREFIX)}
    path = write(tmp_path / "bare.safetensors", tensors)
    with pytest.raises(UserError) as error:
        inspect_model(path)
    assert str(error.value) == f"{path} has no autoencoder: name a file that has one with --vae"
    info = inspect_model(path, original_file(tmp_path, other))
    assert info.latents.factor == 2
    model = info.load()
    assert model.tensors().keys() == tensors.keys() | other.keys()
    scale = 0.13025 if family == "sdxl" else 0.18215
    assert (info.latents.scale, model.latents.scale) == (scale, scale), "the model's, whatever the file's"


@pytest.fixture
def vae_folder(tmp_path) -> Callable[..., Path]:
    """An autoencoder alone in Diffusers' layout, with changes to its configuration; None leaves an entry out."""

    def make(**changes: object) -> Path:
        vae = tiny.make_model("sdxl").vae
        vae.save_pretrained(tmp_path / "vae")
        file = tmp_path / "vae/config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return tmp_path / "vae"

    return make


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("sdxl", {}, None),
        ("sd1", {}, "scaling_factor 0.13025: latents of Stable Diffusion 1.x models are scaled by 0.18215"),
        # published autoencoders of all families say nothing, and Diffusers' class has a default
        ("sdxl", {"scaling_factor": None}, None),
        ("sd1", {"scaling_factor": None}, None),
        ("sdxl", {"shift_factor": 0.1}, "shift_factor 0.1: latents of SDXL models are scaled by 0.13025"),
        ("sdxl", {"latents_mean": [0, 1, 0, 0], "latents_std": [1, 1, 1, 1]}, "latents_mean .+ and latents_std .+:"),
    ],
)
def test_an_autoencoder_that_scales_otherwise_is_refused(model_files, vae_folder, family, changes, told):
    """Its latents would be trained on as if they were the model's own."""
    folder = vae_folder(**changes)
    if told is None:
        assert inspect_model(model_files(family), folder).vae_path == folder
        return
    with pytest.raises(UserError, match=f"^{folder} has an autoencoder with {told}"):
        inspect_model(model_files(family), folder)


@pytest.mark.parametrize(("family", "other", "scale"), [("sdxl", "sd1", 0.18215), ("sd2", "sdxl", 0.13025)])
def test_a_whole_model_of_another_scale_is_refused(tmp_path, model_files, family, other, scale):
    """As a file, and as a folder whose autoencoder says nothing of it, as that of Stable Diffusion 1.5."""
    write_folder(tiny.make_model(other), tmp_path / "folder")
    config = tmp_path / "folder/vae/config.json"
    told = json.loads(config.read_text())
    del told["scaling_factor"]
    config.write_text(json.dumps(told))
    for path in (model_files(other), tmp_path / "folder"):
        with pytest.raises(UserError, match=f"^{path} has an autoencoder with scaling_factor {scale}: latents of"):
            inspect_model(model_files(family), path)
        assert inspect_model(model_files(other), path).vae_path == path


def test_the_configuration_beside_weights_is_read(model_files, vae_folder):
    weights = vae_folder() / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=f"^{weights} has an autoencoder with scaling_factor 0.13025"):
        inspect_model(model_files("sd1"), weights)
    assert inspect_model(model_files("sdxl"), weights).load_vae() is not None
    # that of something else says nothing of these weights
    vae_folder(_class_name="UNet2DConditionModel")
    assert inspect_model(model_files("sd1"), weights).vae_path == weights


def test_an_autoencoder_of_the_hub_is_looked_for_once(tmp_path, model_files, other, monkeypatch):
    path, asked = original_file(tmp_path, other), []

    def find(name: object, flag: str = "", variant: str | None = None) -> Path:
        if str(name) == "owner/name":
            asked.append(flag)
            return path
        return Path(name)

    monkeypatch.setattr(registry, "find_model", find)
    info = inspect_model(model_files("sd1"), "owner/name")
    assert (info.vae, info.vae_path, info.vae_hashes) == ("owner/name", path, hash_file(path))
    tensors = info.load().tensors()
    assert all(torch.equal(tensors[key], other[key]) for key in other)
    assert info.vae_fingerprint
    assert asked == ["--vae"]


def test_a_file_with_a_part_of_an_autoencoder_is_not_complete(tmp_path, model_files, other):
    key = f"{VAE_PREFIX}decoder.conv_out.bias"
    less = {name: tensor for name, tensor in all_of(model_files("sd1")).items() if name != key}
    with pytest.raises(UserError, match=f"less.safetensors lacks {key}"):
        inspect_model(write(tmp_path / "less.safetensors", less)).load()
    named = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in other.items() if name != key}
    with pytest.raises(UserError, match=r"lacks .*decoder\.conv_out\.bias"):
        inspect_model(model_files("sd1"), write(tmp_path / "vae.safetensors", named)).load()


@pytest.mark.parametrize(
    "key", ["lora_unet_x.lora_down.weight", "down_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"]
)
def test_another_kind_of_file_is_no_autoencoder(tmp_path, model_files, key):
    path = write(tmp_path / "x.safetensors", {key: torch.zeros(4, 4)})
    with pytest.raises(UserError) as error:
        inspect_model(model_files("sd1"), path)
    assert str(error.value) == f"--vae: {path} holds no autoencoder of Stable Diffusion"


def test_a_missing_file_is_named_with_its_flag(tmp_path, model_files):
    with pytest.raises(UserError, match=f"^--vae: {tmp_path / 'vae.pt'} does not exist"):
        inspect_model(model_files("sd1"), tmp_path / "vae.pt")


def test_an_autoencoder_of_other_latents_does_not_fit(tmp_path, model_files):
    wide = tiny.make_model(vae_config={"latent_channels": 16}).tensors()
    named = {key: tensor for key, tensor in wide.items() if key.startswith(VAE_PREFIX)}
    path = write(tmp_path / "vae16.safetensors", named)
    with pytest.raises(UserError, match=f"^{path} does not fit: its autoencoder's latents have 16 channels"):
        inspect_model(model_files("sd1"), path)


def test_latents_are_made_with_it_and_the_lora_names_it(train, flags, tmp_path, other):
    vae = original_file(tmp_path, other)
    train(flags(tmp_path / "own", max_train_steps=1))
    train(flags(tmp_path / "other", max_train_steps=1, vae=vae))
    own, changed = (tmp_path / name / "run.safetensors" for name in ("own", "other"))
    assert tiny.largest_difference(own, changed) > 0
    with open_weights(changed) as file:
        told = {name: value for name, value in file.metadata.items() if "vae" in name}
    hashes = hash_file(vae)
    assert told == {"ss_vae_name": vae.name, "ss_vae_hash": hashes.legacy, "ss_new_vae_hash": hashes.sha256}
