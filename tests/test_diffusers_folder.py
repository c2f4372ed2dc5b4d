"""Diffusers folders of every kind and age, read as original files."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.diffusers_writer import write_folder
from library.models.files.checkpoint import open_weights
from library.models.files.diffusers_folder import open_component, open_folder
from library.models.files.sources import open_model, open_vae
from library.models.loading import load
from library.models.registry import inspect_model, load_model
from library.models.sd import StableDiffusion1
from tests.tiny import make_model

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
# What no folder holds, by family.
REBUILT = {
    "sd1": {POSITIONS},
    "sd2": {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"},
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    },
}
LAYERS = "cond_stage_model.model.transformer.resblocks."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family as other programs write it."""
    base = tmp_path_factory.mktemp("folders")
    for family in REBUILT:
        write_folder(make_model(family), base / family)
        (base / family / "original_layout.safetensors").unlink()
    return base


@pytest.fixture
def copy(folders, tmp_path):
    def copy(family="sd1"):
        return shutil.copytree(folders / family, tmp_path / family)

    return copy


def contents(file):
    with file:
        return file.tensors()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", REBUILT)
def test_what_a_folder_cannot_hold_is_made_anew_and_named(folders, tmp_path, fresh_console, capsys, family):
    model = make_model(family)
    model.carried = {}
    model.save(tmp_path / "file.safetensors")
    theirs = contents(open_weights(tmp_path / "file.safetensors"))
    ours = contents(open_folder(folders / family))
    said = capsys.readouterr().err
    added = ours.keys() - theirs.keys()
    assert same({key: ours[key] for key in theirs}, theirs)
    assert {key for key in added if not key.startswith(LAYERS)} == REBUILT[family]
    assert all(name in said for name in REBUILT[family])
    assert len(said.splitlines()) == 1
    for key in added:
        if key.endswith("position_ids"):
            assert torch.equal(ours[key], torch.arange(77)[None])
        elif key.endswith("logit_scale"):
            assert ours[key].item() == pytest.approx(4.6052, abs=1e-4)
        elif key.endswith("text_projection"):
            assert torch.equal(ours[key], torch.eye(64))
        else:
            number = model.text_encoders[0].layers
            assert torch.equal(ours[key], ours[key.replace(f"{LAYERS}{number}.", f"{LAYERS}{number - 1}.")])
    assert (len([key for key in added if key.startswith(LAYERS)]) == 12) == (family == "sd2")
    assert load_model(folders / family).name == family


def rename(path, change):
    """Rewrite a file of tensors: `change` gives (new name, tensor)."""
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path, {"format": "pt"})


def old_attention(name, tensor):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        if f".attentions.0.{new}." in name:
            return name.replace(new, old), tensor[..., None, None].contiguous() if tensor.ndim == 2 else tensor
    return name, tensor


@pytest.mark.parametrize("family", REBUILT)
def test_other_spellings_are_the_same_model(folders, copy, family):
    folder = copy(family)
    rename(folder / "vae/diffusion_pytorch_model.safetensors", old_attention)
    rename(folder / "text_encoder/model.safetensors", lambda name, tensor: (name.removeprefix("text_model."), tensor))
    file = folder / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.zeros(1, 77)}, file)
    rename(
        folder / "unet/diffusion_pytorch_model.safetensors",
        lambda name, tensor: (
            name,
            tensor.reshape(tensor.shape[:2]) if "attentions" in name and tensor.ndim == 4 else tensor,
        ),
    )
    one, other = load_model(folders / family), load_model(folder)
    assert same(one.state_dict(), other.state_dict())


def as_variant(folder, variant):
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(f".{variant}.safetensors"))


def as_shards(folder, variant=""):
    for path in list(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        half = len(tensors) // 2
        parts, places = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])], {}
        for number, part in enumerate(parts, 1):
            name = f"{path.stem}{variant}-0000{number}-of-00002.safetensors"
            save_file(part, path.with_name(name), {"format": "pt"})
            places |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        path.with_name(f"{path.name}.index{variant}.json").write_text(json.dumps(index))
        path.unlink()


def as_pickles(folder):
    for path in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: as_variant(folder, "fp16"),
        lambda folder: as_variant(folder, "non_ema"),
        as_shards,
        lambda folder: as_shards(folder, ".fp16"),
        as_pickles,
    ],
)
def test_weights_are_found_in_every_form(folders, copy, change):
    folder = copy()
    change(folder)
    assert same(load_model(folders / "sd1").state_dict(), load_model(folder).state_dict())


def test_full_precision_is_read_first_and_a_variant_when_asked_for(folders, copy):
    folder = copy()
    for path in list(folder.rglob("*.safetensors")):
        tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    name = "model.diffusion_model.out.2.weight"
    with open_folder(folders / "sd1") as file, open_folder(folder) as both, open_folder(folder, "fp16") as rounded:
        assert torch.equal(both.get(name), file.get(name))
        assert torch.equal(rounded.get(name), file.get(name) + 1)


def test_folders_of_diffusers_own_are_read(tmp_path):
    from tests.test_diffusers_compat import make_pipeline

    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "theirs", variant="fp16")
    with open_folder(tmp_path / "theirs") as file:
        model = load(StableDiffusion1, file)  # not recognised as a model to train: its vocabulary is a small one
    assert same(model.unet.state_dict(), pipeline.unet.state_dict())
    assert same(model.vae.state_dict(), pipeline.vae.state_dict())
    assert same(model.text_encoders[0].model.state_dict(), pipeline.text_encoder.state_dict())
    # what no shape tells comes from the configuration: the number of groups and of heads
    assert model.unet.config.attention_head_dim == 4
    assert model.unet.config.norm_num_groups == 8
    assert model.text_encoders[0].model.config.num_attention_heads == 4


def test_tensors_that_no_model_has_are_refused(copy):
    folder = copy()
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"adapter.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"unet\.adapter\.weight"):
        load_model(folder)


def test_an_autoencoder_alone(folders, copy, tmp_path):
    whole = {
        key: value
        for key, value in contents(open_folder(folders / "sdxl")).items()
        if key.startswith("first_stage_model.")
    }
    AutoencoderKL.from_pretrained(folders / "sdxl/vae").save_pretrained(tmp_path / "vae")
    assert same(contents(open_component(tmp_path / "vae", "vae")), whole)
    for name in (folders / "sdxl", folders / "sdxl/vae", tmp_path / "vae/diffusion_pytorch_model.safetensors"):
        assert same(contents(open_vae(name)), whole)
    with open_model(folders / "sd1", folders / "sdxl") as file:
        assert file.configs["vae"]["scaling_factor"] == 0.13025
        key = "first_stage_model.decoder.conv_in.weight"
        assert torch.equal(file.get(key), whole[key])


def test_what_another_autoencoder_replaces_may_be_missing(folders, copy):
    folder = copy()
    shutil.rmtree(folder / "vae")
    change_index(folder, vae=[None, None])
    with pytest.raises(UserError, match="it lacks a U-Net, an autoencoder or a text encoder"):
        inspect_model(folder)
    model = inspect_model(folder, folders / "sd1").load()
    assert same(model.vae.state_dict(), load_model(folders / "sd1").vae.state_dict())


def test_an_autoencoder_that_says_nothing_of_its_scaling_says_nothing(copy):
    """Otherwise the default of Diffusers' class would pass for its own."""
    folder = copy("sdxl")
    with open_model(folder) as file:
        assert file.configs["vae"]["scaling_factor"] == 0.13025
    path = folder / "vae/config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    with open_model(folder) as file:
        assert "scaling_factor" not in file.configs["vae"]
    assert load_model(folder).vae.config.scaling_factor == 0.13025


def change_index(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), r"vae is missing: the model is incomplete"),
        (lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(), r"unet holds no weights"),
        (lambda folder: (folder / "unet/config.json").unlink(), r"unet/config\.json cannot be read: No such file"),
        (lambda folder: (folder / "model_index.json").write_text("{"), r"model_index\.json is damaged, it is not JSON"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").write_text("[]"), r"holds no JSON object"),
        (lambda folder: (folder / "model_index.json").unlink(), r"without model_index\.json"),
        (
            lambda folder: change_index(folder, _class_name="FluxPipeline", unet=[None, None]),
            r"is a FluxPipeline, which is no model of Stable Diffusion",
        ),
        (
            lambda folder: change_index(folder, _class_name="Kandinsky", unet=["diffusers", "UNet3D"]),
            r"is a Kandinsky, which is no model .*: its unet is a UNet3D",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(copy, damage, said):
    folder = copy()
    damage(folder)
    with pytest.raises(UserError, match=said):
        inspect_model(folder)


def test_a_folder_around_a_model_points_to_it(copy, tmp_path):
    folder = copy()
    with pytest.raises(UserError, match=rf"did you mean {folder}\?"):
        inspect_model(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=rf"give the file in it, {tmp_path / 'model.ckpt'}"):
        inspect_model(tmp_path)
