"""Whole runs of fine_tune.py on the tiny model: what is trained, and what is written as what."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPMLP

from library.models.files.checkpoint import open_weights
from library.models.registry import load_model
from library.models.sgm_keys import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from library.models.writing import format_of, write_model
from tests.processes import train_script
from tests.tiny import largest_difference, make_model, stored
from tests.whole_models import EVERY_PARAMETER, PROPORTIONAL, ROUNDING, names, unchanged


@pytest.fixture
def words(flags, pictures, metadata_file):
    """`words(folder, **changes)`: the flags of a run into this folder."""

    def make(folder: Path, **changes: object) -> list[str]:
        data = {"train_data_dir": pictures / "1_sks shape", "in_json": metadata_file, "caption_extension": None}
        return flags(folder, network_module=None, **data | PROPORTIONAL | changes)

    return make


@pytest.fixture
def run(train, words, tmp_path):
    """`run(name, **changes)` trains into a folder of this name and returns it."""

    def start(name: str, **changes: object) -> Path:
        train(words(tmp_path / name, **changes), script="fine_tune")
        return tmp_path / name

    return start


# What is trained


def test_the_unet_is_trained_and_nothing_else(run, model_file, capsys):
    folder = run("a", **EVERY_PARAMETER)
    assert [path.name for path in folder.iterdir()] == ["run.safetensors"]
    assert unchanged(model_file, folder / "run.safetensors") == names(model_file, VAE_PREFIX, CLIP_PREFIX)
    printed = capsys.readouterr().out
    assert "unet: weights changed by" in printed
    assert "text_encoder" not in printed


def test_the_text_encoder_is_trained_with_its_flag_at_its_own_rate(run, model_file, capsys):
    changes = {**EVERY_PARAMETER, "train_text_encoder": True}
    both = run("both", **changes) / "run.safetensors"
    assert unchanged(model_file, both) == names(model_file, VAE_PREFIX)
    assert "text_encoder: weights changed by" in capsys.readouterr().out
    still = run("still", **changes, learning_rate_te=0) / "run.safetensors"
    assert unchanged(model_file, still) == names(model_file, VAE_PREFIX, CLIP_PREFIX)
    alone = run("alone", **changes | {"learning_rate": 0, "learning_rate_te": 1e-3}) / "run.safetensors"
    assert unchanged(model_file, alone) == names(model_file, VAE_PREFIX, UNET_PREFIX)


def test_a_rate_without_anything_to_use_it_on_is_told_of(run, refused, capsys):
    run("a", learning_rate_te=0.1, max_train_steps=1)
    assert "--learning_rate_te has no effect" in capsys.readouterr().err
    assert "nothing is left to train" in refused(learning_rate=0)


def test_captions_are_read_as_the_flags_say(run, model_files, monkeypatch):
    """Of the two layers of this text encoder the last has no part in the answer, and learns nothing. With gradient
    checkpointing the other one computes twice.
    """
    calls, forward = [], CLIPMLP.forward
    monkeypatch.setattr(CLIPMLP, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    base = model_files("sd2")
    changes = {"v2": True, "max_token_length": 150, "clip_skip": 2, "train_text_encoder": True}
    file = run("a", pretrained_model_name_or_path=base, gradient_checkpointing=True, **changes) / "run.safetensors"
    same = unchanged(base, file)
    trained_layer = names(base, f"{OPEN_CLIP_PREFIX}transformer.resblocks.0.")
    assert trained_layer
    assert not trained_layer & same
    assert names(base, f"{OPEN_CLIP_PREFIX}transformer.resblocks.1.") <= same
    twice = len(calls)
    plain = run("plain", pretrained_model_name_or_path=base, **changes) / "run.safetensors"
    assert (twice, len(calls) - twice) == (4 * 3, 4 * 2)
    assert largest_difference(file, plain) < ROUNDING


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(run, words, model_file, tmp_path):
    """Three batches per epoch, so every second step has none for the second process."""
    launcher = ("torchrun", "--standalone", "--nproc_per_node", "2")
    result = train_script(words(tmp_path / "two", train_text_encoder=True), launcher, "fine_tune.py")
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("run.safetensors") == 1
    two = tmp_path / "two" / "run.safetensors"
    one = run("one", gradient_accumulation_steps=2, train_text_encoder=True) / "run.safetensors"
    assert largest_difference(one, model_file) > 1000 * ROUNDING
    assert largest_difference(one, two) < ROUNDING


def test_previews_and_saves_on_the_way_change_nothing(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    watched = run(
        "watched", train_text_encoder=True, save_every_n_steps=2, sample_prompts=prompts, sample_every_n_steps=2
    )
    assert (watched / "run-step00000002.safetensors").is_file()
    assert len(list((watched / "sample").iterdir())) == 2
    alone = run("alone", train_text_encoder=True)
    assert stored(watched / "run.safetensors") == stored(alone / "run.safetensors")


# Precision


def test_what_is_trained_stays_exact_in_half_precision(run, model_file):
    changes = {"mixed_precision": "bf16", "learning_rate": 1e-12, "max_train_steps": 1}
    exact = load_file(run("exact", save_precision="float", **changes) / "run.safetensors")
    before = load_file(model_file)
    trained, frozen = names(model_file, UNET_PREFIX), names(model_file, CLIP_PREFIX)
    assert all(torch.allclose(exact[name], before[name], atol=1e-10) for name in trained)
    assert all(torch.equal(exact[name], before[name].to(exact[name]).bfloat16().float()) for name in frozen)
    rounded = load_file(run("rounded", **changes) / "run.safetensors")
    assert {tensor.dtype for tensor in rounded.values() if tensor.is_floating_point()} == {torch.bfloat16}


# What is written


@pytest.mark.parametrize(
    ("base", "changes", "written"),
    [
        ("safetensors", {}, "safetensors"),
        ("ckpt", {}, "ckpt"),
        ("diffusers", {}, "diffusers"),
        ("diffusers_safetensors", {}, "diffusers_safetensors"),
        ("ckpt", {"use_safetensors": True}, "safetensors"),
        ("diffusers", {"use_safetensors": True}, "diffusers_safetensors"),
        ("diffusers_safetensors", {"save_model_as": "ckpt", "use_safetensors": True}, "ckpt"),
    ],
)
def test_the_format_is_that_of_the_base_model_if_no_flag_says_another(run, tmp_path, base, changes, written):
    source = write_model(make_model(), tmp_path / "base", base)
    folder = run("a", pretrained_model_name_or_path=source, max_train_steps=1, save_every_n_steps=1, **changes)
    ending = "" if written.startswith("diffusers") else f".{written}"
    assert {path.name for path in folder.iterdir()} == {f"run{ending}", f"run-step00000001{ending}"}
    assert format_of(folder / f"run{ending}") == written
    model = load_model(folder / f"run{ending}")
    assert not torch.equal(model.unet.conv_in.weight, load_model(source).unet.conv_in.weight)


def test_the_autoencoder_that_was_asked_for_is_saved(run, model_file, tmp_path):
    other = make_model()
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1
    other.save(tmp_path / "vae.safetensors")
    saved = run("a", vae=tmp_path / "vae.safetensors", max_train_steps=1) / "run.safetensors"
    assert unchanged(tmp_path / "vae.safetensors", saved) >= names(model_file, VAE_PREFIX)


def test_diffusers_loads_the_result(run):
    folder = run("a", save_model_as="diffusers_safetensors", train_text_encoder=True)
    single = load_model(run("b", train_text_encoder=True) / "run.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "run", local_files_only=True)
    for module, ours in ((pipeline.unet, single.unet), (pipeline.vae, single.vae)):
        state = module.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())
    theirs = dict(pipeline.text_encoder.named_parameters())
    ours = dict(single.text_encoders[0].model.named_parameters())
    assert len(ours) == len(theirs)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_the_file_tells_how_it_was_made(run):
    with open_weights(run("a", max_train_steps=2, metadata_title="Mine") / "run.safetensors") as file:
        told = file.metadata
        file.verify()
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert (told["modelspec.title"], told["modelspec.resolution"]) == ("Mine", "32x32")
    assert (told["ss_learning_rate"], told["ss_steps"], told["ss_num_train_images"]) == ("0.1", "2", "6")
    assert not any("network" in name for name in told)
    with open_weights(run("b", max_train_steps=2, no_metadata=True) / "run.safetensors") as file:
        assert not any(name.startswith("ss_") for name in file.metadata)


# What is refused before anything is loaded


def test_datasets_are_described_by_metadata_files(run, refused, pictures, metadata_file, tmp_path):
    assert "use train_db.py" in refused(in_json=None)
    dataset = tmp_path / "data.toml"
    subset = {"image_dir": str(pictures / "1_sks shape"), "metadata_file": str(metadata_file)}
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in subset.items())
    dataset.write_text(f"[[datasets]]\n[[datasets.subsets]]\n{lines}\n")
    described = run("a", dataset_config=dataset, train_data_dir=None, in_json=None) / "run.safetensors"
    assert stored(described) == stored(run("b") / "run.safetensors")


def test_flags_and_models_that_do_not_go_together(refused, model_files):
    sdxl = refused(pretrained_model_name_or_path=model_files("sdxl"))
    assert "is an SDXL model: train it with sdxl_train.py" in sdxl
    cached = refused(cache_text_encoder_outputs=True, train_text_encoder=True)
    assert "what a text encoder puts out changes while it is trained" in cached
    assert "--save_model_as: 'pt' is none of ckpt" in refused(save_model_as="pt")


def test_nothing_of_the_users_is_replaced(refused, tmp_path):
    stem = tmp_path / "refused" / "model"  # in the folder of the run
    base = write_model(make_model(), stem, "safetensors")
    here = {"output_name": "model", "pretrained_model_name_or_path": base}
    before = base.read_bytes()
    assert "would be replaced: choose another --output_name" in refused(**here)
    stem.mkdir()
    (stem / "notes.txt").write_text("mine")
    assert "other things in it (notes.txt)" in refused(save_model_as="diffusers", **here)
    (stem / "notes.txt").unlink()
    stem.rmdir()
    folder = write_model(make_model(), stem, "diffusers_safetensors")
    assert f"writing it would remove {folder}" in refused(**here | {"pretrained_model_name_or_path": folder})
    assert base.read_bytes() == before


def test_a_state_goes_on_and_one_of_a_network_is_refused(run, refused, train, flags, tmp_path):
    changes = {"train_text_encoder": True, "save_state": True, "save_every_n_steps": 2}
    whole = run("whole", **changes)
    broken = run("broken", **changes, resume=whole / "run-step00000002-state")
    assert stored(broken / "run.safetensors") == stored(whole / "run.safetensors")
    train(flags(tmp_path / "network", save_state_on_train_end=True, max_train_steps=2))
    message = refused(resume=tmp_path / "network")
    assert "network/run-state is the state of something else than what these flags train" in message
    assert "(it is of a network, not of the model itself)" in message
