"""networks/extract_lora_from_models.py: what was put into a model comes out of it again, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library import cli
from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.lora.names import named_modules
from library.models.diffusers_writer import write_folder
from library.models.family import Family
from library.models.files.checkpoint import hash_file, write_tensors
from library.models.registry import load_model
from networks import extract_lora_from_models
from networks.lora import TEXT_ENCODER_TARGETS, UNET_TARGETS, find_layers
from tests.pipelines import pixels
from tests.tiny import make_model, stored
from tests.trained import check_in_diffusers, with_lora

SCRIPT = "networks/extract_lora_from_models.py"
CONVOLUTIONS = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
LOSSLESS = ("--clamp_quantile", 1, "--min_diff", 0)
FAMILIES = {"sd1": (), "sd2": ("--v2",), "sdxl": ("--sdxl",)}

Tool = Callable[..., None]


@pytest.fixture
def tool(monkeypatch, fresh_console) -> Tool:
    """The script in this process, with LOSSLESS and rank 4 unless told otherwise."""

    def call(original: Path, tuned: Path, output: Path, *words: object, lossless: bool = True) -> None:
        given = ["--model_org", original, "--model_tuned", tuned, "--save_to", output]
        given += [*(LOSSLESS if lossless else ()), *words]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, given)])
        cli.run(extract_lora_from_models.main)

    return call


def adapted(model: Family, convolutions: bool = False) -> dict[str, torch.nn.Module]:
    """The layers that a LoRA changes, by name."""
    points, targets = model.attach_points(), UNET_TARGETS | (CONVOLUTIONS if convolutions else set())
    names = find_layers(points.text_encoder, points.unet, TEXT_ENCODER_TARGETS, targets)
    modules = named_modules(points)
    return {name: modules[name] for name in names}


@torch.no_grad()
def tuned(model: Family, rank: int = 3, convolutions: bool = False, strength: float = 1.0, only: str = "") -> Family:
    """The model with a product of this rank added to its layers, as large as the weights themselves by default."""
    generator = torch.Generator().manual_seed(7)
    for name, module in adapted(model, convolutions).items():
        weight = module.weight.flatten(1)
        up = torch.randn(len(weight), rank, generator=generator)
        down = torch.randn(rank, weight.shape[1], generator=generator)
        if name.startswith(only):
            module.weight += (strength * weight.std() / rank**0.5 * up @ down).view(module.weight.shape)
    return model


def save(model: Family, path: Path, dtype: torch.dtype | None = None) -> Path:
    model.save(path, dtype)
    return path


def products(file: Path) -> dict[str, Tensor]:
    """The change of each layer's flattened weight, in float64."""
    tensors = load_file(file)
    names = {key.partition(".")[0] for key in tensors}
    factors = {
        name: [tensors[f"{name}.{part}.weight"].double().flatten(1) for part in ("lora_up", "lora_down")]
        for name in names
    }
    return {name: up @ down * (tensors[f"{name}.alpha"].double() / len(down)) for name, (up, down) in factors.items()}


def differences(original: Path, other: Path, convolutions: bool = False) -> dict[str, Tensor]:
    before, after = (adapted(load_model(path), convolutions) for path in (original, other))
    return {name: (after[name].weight.double() - before[name].weight.double()).detach().flatten(1) for name in before}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def pair(model_files, tmp_path) -> tuple[Path, Path]:
    """SD 1 and a model made of it."""
    return model_files("sd1"), save(tuned(make_model()), tmp_path / "tuned.safetensors")


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [*((family, torch.float32, 1e-5) for family in FAMILIES), ("sd2", torch.float16, 2e-3)],
)
def test_a_product_that_was_merged_comes_back(tool, tmp_path, capsys, family, dtype, tolerance):
    base = save(make_model(family), tmp_path / "base.safetensors", dtype)
    other = save(tuned(make_model(family), convolutions=True), tmp_path / "tuned.safetensors", dtype)
    output = tmp_path / "lora.safetensors"
    tool(base, other, output, *FAMILIES[family], "--dim", 4, "--conv_dim", 5)
    found, wanted = products(output), differences(base, other, convolutions=True)
    assert found.keys() == wanted.keys()
    assert len(wanted) > len(adapted(make_model(family)))
    for name, product in wanted.items():
        assert (found[name] - product).norm() <= tolerance * product.norm(), name
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(output).items()}
    conv = next(key for key, shape in shapes.items() if shape[2:] == (3, 3))
    assert shapes[conv][0] == 5
    assert shapes[conv.replace("lora_down", "lora_up")][1:] == (5, 1, 1)
    assert {shape[0] for key, shape in shapes.items() if "down.weight" in key and shape[2:] != (3, 3)} == {4}
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{output} written"
    assert all("100.00% of the difference kept" in line for line in said[:-1])
    assert said[-2].startswith(f"Together: {len(wanted)} layers")


def test_without_conv_dim_only_the_layers_of_a_plain_lora(tool, pair, tmp_path):
    tool(*pair, tmp_path / "lora.safetensors")
    assert products(tmp_path / "lora.safetensors").keys() == adapted(make_model()).keys()


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_base_and_lora_paint_as_the_tuned_model(tool, tmp_path, model_files, family):
    other, output = save(tuned(make_model(family)), tmp_path / "tuned.safetensors"), tmp_path / "lora.safetensors"
    tool(model_files(family), other, output)
    check_in_diffusers(output, lambda: load_model(model_files(family)))
    request = parse_line("sks, a red circle --w 32 --h 48 --s 4 --l 5 --d 3")
    lora, model = with_lora(load_model(model_files(family)), output), load_model(other)
    assert np.abs(pixels(paint(lora, request)) - pixels(paint(model, request))).max() <= 1


def test_folders_and_ckpt_are_read_alike(tool, pair, tmp_path):
    original, other = pair
    tool(original, other, tmp_path / "one.safetensors")
    write_folder(load_model(original), tmp_path / "folder")
    write_tensors(tmp_path / "tuned.ckpt", load_file(other), beside={})
    tool(tmp_path / "folder", tmp_path / "tuned.ckpt", tmp_path / "two.safetensors")
    assert stored(tmp_path / "one.safetensors") == stored(tmp_path / "two.safetensors")
    tool(original, other, tmp_path / "three.pt")
    found, wanted = torch.load(tmp_path / "three.pt", weights_only=True), load_file(tmp_path / "one.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_number_of_threads_makes_no_difference(tool, pair, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tool(*pair, tmp_path / f"{threads}.safetensors")
    finally:
        torch.set_num_threads(before)
    assert stored(tmp_path / "1.safetensors") == stored(tmp_path / "2.safetensors")


def test_exact_finds_at_most_a_little_more(tool, pair, tmp_path):
    for name, flags in (("quick", ()), ("exact", ("--exact",))):
        tool(*pair, tmp_path / f"{name}.safetensors", "--dim", 2, *flags)
    quick, exact = (products(tmp_path / f"{name}.safetensors") for name in ("quick", "exact"))
    for name, difference in differences(*pair).items():
        assert (difference - quick[name]).norm() <= 1.01 * (difference - exact[name]).norm()
        best = torch.linalg.svdvals(difference)[2:].norm()
        assert (difference - exact[name]).norm() <= best * (1 + 1e-4)


def test_clamping_at_the_default_quantile(tool, pair, tmp_path, capsys):
    """All absolute values of both factors are taken together; what that costs is told."""
    tool(*pair, tmp_path / "free.safetensors", "--min_diff", 0)
    capsys.readouterr()
    tool(*pair, tmp_path / "clamped.safetensors", "--min_diff", 0, lossless=False)
    said = capsys.readouterr().out
    free, clamped = (load_file(tmp_path / f"{name}.safetensors") for name in ("free", "clamped"))
    limits = []
    for name in adapted(make_model()):
        keys = [f"{name}.{part}.weight" for part in ("lora_up", "lora_down")]
        limit = torch.quantile(torch.cat([free[key].flatten() for key in keys]).abs(), 0.99).item()
        limits.append(limit)
        for key in keys:
            torch.testing.assert_close(clamped[key], free[key].clamp(-limit, limit), rtol=1e-5, atol=1e-7)
    assert len(set(limits)) == len(limits)
    wanted, found = differences(*pair), products(tmp_path / "clamped.safetensors")
    lost = sum((wanted[name] - found[name]).square().sum() for name in wanted)
    total = sum(difference.square().sum() for difference in wanted.values())
    assert f"100.00% of the difference kept, {1 - lost / total:.2%} after clamping" in said.splitlines()[-2]


def test_text_encoders_that_differ_little_are_left_out_and_told(tool, tmp_path, capsys, model_files):
    """Each by itself: of SDXL's two the second one is changed by more than the limit, the first by less."""
    model = tuned(make_model("sdxl"), only="lora_unet")
    tuned(model, only="lora_te2")
    tuned(model, only="lora_te1", strength=1e-3)
    base, other = model_files("sdxl"), save(model, tmp_path / "tuned.safetensors")
    largest = {
        start: max(d.abs().max().item() for name, d in differences(base, other).items() if name.startswith(start))
        for start in ("lora_te1", "lora_te2")
    }
    assert largest["lora_te1"] < 0.01 < largest["lora_te2"]
    tool(base, other, tmp_path / "lora.safetensors", lossless=False)
    assert {name.split("_")[1] for name in products(tmp_path / "lora.safetensors")} == {"te2", "unet"}
    sentence = f"warning: the text encoder 1 differs by up to {largest['lora_te1']:.3g} and is left out"
    assert f"{sentence}, as that is not above --min_diff 0.01: with --min_diff 0 it is kept" in capsys.readouterr().err
    tool(base, other, tmp_path / "all.safetensors", "--min_diff", 0, lossless=False)
    assert {name.split("_")[1] for name in products(tmp_path / "all.safetensors")} == {"te1", "te2", "unet"}
    assert "warning" not in capsys.readouterr().err


def test_a_text_encoder_that_only_another_format_changes_is_the_same(tool, tmp_path, capsys, model_files):
    model = tuned(make_model(), only="lora_unet")
    other = save(model, tmp_path / "tuned.safetensors", torch.float16)
    tool(model_files("sd1"), other, tmp_path / "lora.safetensors")
    assert all(name.startswith("lora_unet") for name in products(tmp_path / "lora.safetensors"))
    said = capsys.readouterr().err
    assert "the text encoder is the same in both models and is left out" in said
    assert "warning" not in said


def test_precisions_of_reading_and_of_writing(tool, pair, tmp_path):
    tool(*pair, tmp_path / "lora.safetensors", "--load_precision", "bf16", "--save_precision", "fp16")
    factors = [tensor for tensor in load_file(tmp_path / "lora.safetensors").values() if tensor.dim()]
    assert {tensor.dtype for tensor in factors} == {torch.float16}
    rounded = [tmp_path / "original.safetensors", tmp_path / "rounded.safetensors"]
    for path, source in zip(rounded, pair, strict=True):
        save(load_model(source), path, torch.bfloat16)
    tool(*rounded, tmp_path / "same.safetensors", "--save_precision", "fp16")
    assert stored(tmp_path / "lora.safetensors") == stored(tmp_path / "same.safetensors")
    tool(*pair, tmp_path / "other.safetensors", "--save_precision", "fp16")
    assert stored(tmp_path / "lora.safetensors") != stored(tmp_path / "other.safetensors")


def test_metadata(tool, pair, tmp_path):
    tool(*pair, tmp_path / "lora.safetensors", "--dim", 3, "--conv_dim", 2)
    found, hashes = metadata(tmp_path / "lora.safetensors"), hash_file(pair[0])
    wanted = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "2"}',
        "ss_sd_model_name": pair[0].name,
        "ss_sd_model_hash": hashes.legacy,
        "ss_new_sd_model_hash": hashes.sha256,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "lora",
    }
    assert found.items() >= wanted.items()
    assert len(found["sshs_model_hash"]) == 64
    made_by = json.loads(found["ss_made_by"])
    assert made_by["sources"] == [{"name": path.name, "sha256": hash_file(path).sha256} for path in pair]
    assert made_by["layers_of_lower_rank"] == 0
    assert str(tmp_path) not in str(found)
    tool(*pair, tmp_path / "bare.safetensors", "--no_metadata")
    assert {key for key in metadata(tmp_path / "bare.safetensors") if not key.startswith("sshs")} == {
        *("ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha")
    }


def test_models_of_v_prediction_are_told(tool, tmp_path, capsys, model_files):
    """What the flag says wins, as it does in the conversion of models."""
    other = save(tuned(make_model("sd2")), tmp_path / "tuned.safetensors")
    tool(model_files("sd2"), other, tmp_path / "lora.safetensors", "--v2", "--v_parameterization")
    found = metadata(tmp_path / "lora.safetensors")
    assert (found["ss_v2"], found["modelspec.prediction_type"]) == ("True", "v")
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert "says that it predicts the noise: by --v_parameterization the LoRA says v" in capsys.readouterr().err


def test_ranks_above_what_layers_have_are_lowered(tool, pair, tmp_path):
    tool(*pair, tmp_path / "lora.safetensors", "--dim", 40)
    downs = {key: len(t) for key, t in load_file(tmp_path / "lora.safetensors").items() if "down.weight" in key}
    wanted = differences(*pair)
    limits = {f"{name}.lora_down.weight": min(d.shape) for name, d in wanted.items()}
    assert downs == {key: min(40, limit) for key, limit in limits.items()}
    found = metadata(tmp_path / "lora.safetensors")
    assert found["ss_network_dim"] == "Dynamic"
    assert json.loads(found["ss_made_by"])["layers_of_lower_rank"] == sum(limit < 40 for limit in limits.values()) > 0
    for name, product in products(tmp_path / "lora.safetensors").items():
        torch.testing.assert_close(product, wanted[name], rtol=0, atol=1e-5)


def test_devices_for_whole_models_have_no_effect(tool, pair, tmp_path, capsys):
    tool(*pair, tmp_path / "lora.safetensors", "--load_original_model_to", "cuda", "--device", "cpu")
    assert "--load_original_model_to and --load_tuned_model_to have no effect" in capsys.readouterr().err


# Mistakes


def test_models_that_are_not_what_they_are_said_to_be(mistake, pair, model_files, tmp_path):
    output = tmp_path / "lora.safetensors"
    assert f"--v2: {pair[0]} is a Stable Diffusion 1.x model, leave the flag out" in mistake(*pair, output, "--v2")
    assert f"{pair[0]} is a Stable Diffusion 1.x model" in mistake(*pair, output, "--sdxl")
    assert "a model cannot be both" in mistake(*pair, output, "--sdxl", "--v2")
    sdxl = model_files("sdxl")
    sentence = f"{sdxl} is an SDXL model and {pair[0]} a Stable Diffusion 1.x model: give two models of one family"
    assert sentence in mistake(pair[0], sdxl, output)
    deeper = save(make_model(clip_config={"num_hidden_layers": 2}), tmp_path / "deeper.safetensors")
    assert f"{deeper} is built differently from {pair[0]}: " in mistake(pair[0], deeper, output)
    wider = save(make_model(clip_config={"intermediate_size": 96}), tmp_path / "wider.safetensors")
    assert "mlp_fc1 is not the same layer in both" in mistake(pair[0], wider, output)


def test_models_without_a_difference(mistake, model_file, tmp_path):
    output = tmp_path / "lora.safetensors"
    (tmp_path / "link.safetensors").symlink_to(model_file)
    assert "so there is no difference to extract" in mistake(model_file, tmp_path / "link.safetensors", output)
    for name, dtype in (("same", None), ("rounded", torch.bfloat16)):
        other = save(make_model(), tmp_path / f"{name}.safetensors", dtype)
        assert f"{other} and {model_file} do not differ in the layers of a LoRA" in mistake(model_file, other, output)


def test_outputs_that_cannot_be(mistake, pair, tmp_path):
    assert f"--save_to: {pair[1]} is one of the files to read" in mistake(*pair, pair[1])
    assert "ends in none of" in mistake(*pair, tmp_path / "lora")


def test_flags_that_make_no_sense(mistake, pair, tmp_path, monkeypatch, capsys):
    output = tmp_path / "lora.safetensors"
    assert "--clamp_quantile: 1.5 is no quantile, give 0 to 1" in mistake(*pair, output, "--clamp_quantile", 1.5)
    assert "--dim: 0 is too small" in mistake(*pair, output, "--dim", 0)
    assert "--device: gpu cannot be used" in mistake(*pair, output, "--device", "gpu")
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--model_org", "a.safetensors"])
    with pytest.raises(SystemExit):
        cli.run(extract_lora_from_models.main)
    assert "--model_tuned: a model is not named" in capsys.readouterr().err


def test_files_that_are_missing_broken_or_not_finite(mistake, pair, tmp_path):
    output = tmp_path / "lora.safetensors"
    missing = mistake(pair[0], tmp_path / "tunad.safetensors", output)
    assert f"--model_tuned: {tmp_path / 'tunad.safetensors'} does not exist, did you mean {pair[1]}?" in missing
    whole = pair[1].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    assert "its last 100 bytes are missing" in mistake(pair[0], tmp_path / "cut.safetensors", output)
    (tmp_path / "flipped.safetensors").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert "flipped.safetensors is damaged: its contents" in mistake(pair[0], tmp_path / "flipped.safetensors", output)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors = load_file(pair[1])
    tensors[key][0, 0] = float("inf")
    write_tensors(tmp_path / "infinite.safetensors", tensors)
    sentence = f"{tmp_path / 'infinite.safetensors'} holds numbers that are not finite, in {key}"
    assert sentence in mistake(pair[0], tmp_path / "infinite.safetensors", output)
    assert sentence in mistake(tmp_path / "infinite.safetensors", pair[1], output)


def test_what_else_differs_in_a_text_encoder_is_told(tool, tmp_path, capsys, model_files):
    model = tuned(make_model(), only="lora_unet")
    with torch.no_grad():
        model.text_encoders[0].clip.embeddings.token_embedding.weight[5] += 1
    tool(model_files("sd1"), save(model, tmp_path / "tuned.safetensors"), tmp_path / "lora.safetensors")
    said = capsys.readouterr().err
    assert "the text encoder differs in cond_stage_model.transformer.text_model.embeddings.token_embedding" in said
    assert "the text encoder has the same layers in both models and is left out" in said
