"""Miniature files of every family: untrained ones, and one grown out of another."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from examples.miniature import configs
from examples.miniature.autoencoder import rescale
from examples.miniature.untrained import main, untrained
from examples.miniature.warm_start import grown
from library.generation.paint import paint
from library.generation.prompts import PromptLine
from library.models.files.safetensors_file import SafetensorsFile
from library.models.registry import inspect_model

# What published files hold that no module reads.
UNUSED = {
    "sd1": {
        "betas": (1000,),
        "alphas_cumprod": (1000,),
        "posterior_mean_coef2": (1000,),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    },
    "sd2": {
        "betas": (1000,),
        "cond_stage_model.model.logit_scale": (),
        "cond_stage_model.model.text_projection": (32, 32),
        "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight": (96, 32),
    },
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.1.model.logit_scale": (),
        "conditioner.embedders.1.model.text_projection": (32, 48),
    },
}


def write(monkeypatch, path: Path, family: str, *flags: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["untrained.py", "--family", family, "--output", str(path), *flags])
    main()
    return path


@pytest.mark.parametrize("family", configs.UNTRAINED)
def test_untrained_file_is_small_and_loads_as_its_family(family, tmp_path, monkeypatch, fresh_console) -> None:
    path = write(monkeypatch, tmp_path / "untrained.safetensors", family)
    assert path.stat().st_size <= 10_000_000
    info = inspect_model(path)
    assert (info.family.name, info.latents.factor, info.latents.step) == (family, 8, 16)
    model = info.load()
    picture = paint(model, PromptLine("a red circle", width=32, height=32, seed=0, sample_steps=2))
    assert len(set(picture.getdata())) > 1
    model.save(tmp_path / "again.safetensors", torch.float16)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", configs.UNTRAINED)
def test_untrained_file_has_what_published_files_have_besides_the_modules(family, tmp_path) -> None:
    path = tmp_path / "untrained.safetensors"
    untrained(family).save(path)
    with SafetensorsFile(path) as file:
        held = file.shapes()
        assert {name: held.get(name) for name in UNUSED[family]} == UNUSED[family]
        for name in held:
            if name.endswith("position_ids"):
                assert torch.equal(file.get(name), torch.arange(77)[None])
            if ".resblocks.2." in name and name.endswith("weight") and "ln_" not in name:
                assert not torch.equal(file.get(name), file.get(name.replace("resblocks.2.", "resblocks.1.")))


def test_schedule_tables_agree_with_each_other() -> None:
    tables = untrained("sd1").carried
    products, before = tables["alphas_cumprod"], tables["alphas_cumprod_prev"]
    torch.testing.assert_close(products, before * (1 - tables["betas"]))
    torch.testing.assert_close(tables["sqrt_recip_alphas_cumprod"] ** -2, products)
    assert tables["posterior_mean_coef1"][0] == 1  # at the first timestep there is nothing left to guess
    assert tables["posterior_variance"][0] == 0
    assert (tables["posterior_variance"][1:] < tables["betas"][1:]).all()


def test_seed_decides_about_the_bytes(tmp_path, monkeypatch, fresh_console) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = write(monkeypatch, tmp_path / "one.safetensors", "sdxl").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert write(monkeypatch, tmp_path / "same.safetensors", "sdxl").read_bytes() == one
    assert write(monkeypatch, tmp_path / "other.safetensors", "sdxl", "--seed", "1").read_bytes() != one


@torch.no_grad()
def test_rescaled_autoencoder_paints_the_same_from_rescaled_latents() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**configs.vae(32, 32)).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    before = vae.encode(images).latent_dist
    picture = vae.decode(before.mean).sample
    rescale(vae, 1.4)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mean, before.mean * 1.4)
    torch.testing.assert_close(after.std, before.std * 1.4)
    torch.testing.assert_close(vae.decode(after.mean).sample, picture)


@torch.no_grad()
def test_grown_model_takes_over_what_fits() -> None:
    source = untrained("sd1")
    torch.manual_seed(0)
    model = grown(source, configs.UNTRAINED["sdxl"])
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    ours, theirs = (one.encode_images(images, [0]) * one.latents.scale for one in (model, source))
    torch.testing.assert_close(ours, theirs)  # to the denoiser the latents are what they were
    ours, theirs = (one.unet.state_dict() for one in (model, source))
    assert torch.equal(ours["conv_in.weight"], theirs["conv_in.weight"])
    linear, convolution = (one["mid_block.attentions.0.proj_in.weight"] for one in (ours, theirs))
    assert torch.equal(linear, convolution[:, :, 0, 0])
    ours, theirs = (one.text_encoders[0].state_dict() for one in (model, source))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
