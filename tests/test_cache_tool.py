"""tools/cache_latents.py: what several processes, a kill and a second run leave behind."""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library import cli
from library.models.registry import ModelInfo, inspect_model, load_model
from tests import tiny
from tests.pictures import picture
from tools import cache_latents

SCRIPT = "tools/cache_latents.py"


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.draw_pictures(tmp_path / "data" / "1_sks shape", 7).parent


@pytest.fixture
def words(model_file, data) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model_file), "--train_data_dir", str(data), "--resolution", "32"),
        *("--caption_extension", ".txt", "--vae_batch_size", "2"),
    ]


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """The script in this process, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
        cli.run(cache_latents.main)

    return call


def files(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in data.glob("*/*.npz")}


def test_two_processes_make_the_files_that_one_makes(words, data, tool, fork_server, capfd):
    tool(*words)
    assert "7 files written, 0 valid already, 0 failed" in capfd.readouterr().out
    alone = files(data)
    for path in data.glob("*/*.npz"):
        path.unlink()
    ended = fork_server.run(words, "tools.cache_latents", processes=2)
    assert ended.status == 0, ended.said
    assert "process 1 of 2 on cpu: 4 files written" in ended.said
    assert "process 2 of 2 on cpu: 3 files written" in ended.said
    assert files(data) == alone


def test_a_killed_run_goes_on_to_the_very_same_files(words, data, tool, fork_server, capfd):
    count = 20
    for number in range(count):
        picture(data / "1_sks shape" / f"{number}.png", (32, 32))
    more = ("--max_data_loader_n_workers", "0")
    ended = fork_server.run([*words, *more], "tools.cache_latents", at=100)
    assert ended.status == -signal.SIGKILL, ended.said
    before = files(data)
    assert 5 <= len(before) < count
    tool(*words)
    assert f"{count + 7 - len(before)} files written, {len(before)} valid already" in capfd.readouterr().out
    resumed = files(data)
    assert len(resumed) == count + 7
    assert not list(data.glob("*/*.tmp"))
    for path in data.glob("*/*.npz"):
        path.unlink()
    tool(*words)
    assert files(data) == resumed


def test_where_all_is_there_the_model_is_not_loaded_and_all_is_well(words, data, tool, capfd, monkeypatch):
    tool(*words)
    made = files(data)
    monkeypatch.setattr(ModelInfo, "load_vae", None)
    tool(*words)
    assert "0 files written, 7 valid already, 0 failed" in capfd.readouterr().out
    spoiled = next(data.glob("*/*.npz"))
    values = bytearray(spoiled.read_bytes())
    values[len(values) // 2] ^= 1
    spoiled.write_bytes(values)
    tool(*words, "--skip_existing")
    assert "0 files written, 7 valid already, 0 failed" in capfd.readouterr().out
    assert len(made) == 7


def test_a_picture_that_fails_is_named(words, data, tool, capfd):
    broken = next(data.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:120])
    tool(*words)
    assert f"6 files written, 0 valid already, 1 failed ({broken})" in capfd.readouterr().out


def test_the_latents_are_those_of_training(words, data, tool, flags, train, tmp_path, monkeypatch):
    """A run that caches for itself and one that finds the files train the same weights."""
    common = {"train_data_dir": data, "vae_batch_size": 2, "cache_latents_to_disk": True}
    train(flags(tmp_path / "itself", **common))
    made = files(data)
    for path in data.glob("*/*.npz"):
        path.unlink()
    tool(*words)
    assert files(data) == made
    train(flags(tmp_path / "ahead", **common))
    assert tiny.stored(tmp_path / "itself" / "run.safetensors") == tiny.stored(tmp_path / "ahead" / "run.safetensors")


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--flux"], "--flux: FLUX models are not supported"),
        (["--sdxl"], "is a Stable Diffusion 1.x model: drop --sdxl"),
        (["--color_aug"], "color_aug"),
        (["--resolution", "30"], "multiples of 4"),
        (["--skip_exist"], "did you mean --skip_existing"),
    ],
)
def test_mistakes_are_one_sentence(words, data, tool, extra, sentence, capfd):
    with pytest.raises(SystemExit) as end:
        tool(*words, *extra)
    assert end.value.code == 2
    assert sentence in capfd.readouterr().err
    assert not files(data)


@pytest.mark.parametrize(
    ("family", "extra", "suffix"),
    [("sd2", ["--v2"], "_sd.npz"), ("sdxl", [], "_sdxl.npz"), ("sdxl", ["--sdxl"], "_sdxl.npz")],
)
def test_every_familys_files_have_their_names_and_are_its_own(
    words, data, tool, model_files, capfd, family, extra, suffix
):
    tool(*words, "--pretrained_model_name_or_path", str(model_files(family)), *extra)
    assert "7 files written, 0 valid already, 0 failed" in capfd.readouterr().out
    assert {path.name for path in data.glob("*/*.npz")} == {f"32_{number}_0032x0032{suffix}" for number in range(7)}
    model = load_model(model_files(family))
    image = np.asarray(Image.open(data / "1_sks shape" / "32_3.png").convert("RGB"))
    pixels = torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad(), np.load(data / "1_sks shape" / f"32_3_0032x0032{suffix}") as file:
        posterior = model.vae.encode(pixels).latent_dist
        # unscaled, drawn from the posterior
        deviation = (torch.from_numpy(file["latents"])[None] - posterior.mean) / posterior.std
    assert deviation.abs().max() < 6
    assert 0.8 < deviation.std() < 1.2


def test_the_fingerprint_is_that_of_the_encoder_and_not_of_the_file(model_file, tmp_path):
    whole = load_file(model_file)
    name = "first_stage_model.encoder.mid.attn_1.{}.weight"
    respelled = {
        key.replace("attn_1.q.", "attn_1.to_q."): value[..., 0, 0] if key == name.format("q") else value
        for key, value in whole.items()
        if "model.diffusion_model" not in key or "input" in key
    }
    respelled["first_stage_model.decoder.conv_in.weight"] = whole["first_stage_model.decoder.conv_in.weight"] + 1
    other = whole | {name.format("k"): whole[name.format("k")] + 1}
    found = {}
    for title, tensors in (("whole", whole), ("respelled", respelled), ("other", other)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{title}.safetensors")
        info = replace(inspect_model(model_file), path=tmp_path / f"{title}.safetensors")
        found[title] = info.vae_fingerprint
    assert found["whole"] == found["respelled"] != found["other"]


def test_the_autoencoder_alone_encodes_as_the_model_does(model_file):
    info = inspect_model(model_file)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ours, whole = (model.encode_images(images, [1, 2]) for model in (info.load_vae(), info.load()))
    assert torch.equal(ours, whole)
