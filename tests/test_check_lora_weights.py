"""networks/check_lora_weights.py: what it lists, and what it exits with."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library import cli
from networks import check_lora_weights
from tests.processes import ROOT, run

TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

Tensors = dict[str, torch.Tensor]


def lora() -> Tensors:
    return {
        f"{TEXT}.lora_up.weight": torch.full((6, 2), -0.5),
        f"{TEXT}.lora_down.weight": torch.tensor([[1.0, -3.0, 0.0], [2.0, 2.0, 4.0]]),
        f"{TEXT}.alpha": torch.tensor(1.0),
        f"{TEXT}.dora_scale": torch.ones(6, 1),
        f"{UNET}.lora_up.weight": torch.zeros(5, 4),
        f"{UNET}.lora_down.weight": torch.zeros(4, 768),
        f"{UNET}.alpha": torch.tensor(2.0),
    }


@pytest.fixture
def check(tmp_path, monkeypatch, fresh_console, capsys) -> Callable[..., list[str]]:
    """`check(tensors, *flags)`: the lines that are printed of a file with these."""

    def start(tensors: Tensors, *flags: str, metadata: dict[str, str] | None = None) -> list[str]:
        path = tmp_path / "network.safetensors"
        save_file(tensors, path, metadata)
        monkeypatch.setattr(sys, "argv", ["check_lora_weights.py", str(path), *flags])
        cli.run(check_lora_weights.main)
        return capsys.readouterr().out.splitlines()

    return start


def test_matrices_are_listed_and_what_it_is(check):
    lines = check(lora())
    assert f"{TEXT}.lora_down.weight  2x3  mean |x| 2  -3 .. 4" in lines
    assert [line for line in lines if "alpha  number" in line or "dora_scale" in line] == []
    assert lines[-3:] == [
        "network.safetensors: DoRA of LoRA, LoRA for Stable Diffusion 1.x, stored as float32",
        "text encoder: 1 layers, 4 tensors, rank 2, alpha 1, mean |x| 1",
        "U-Net: 1 layers, 3 tensors, rank 4, alpha 2, mean |x| 0",
    ]


@pytest.mark.parametrize("flag", ["-s", "--show_all_keys"])
def test_all_tensors_are_listed_when_asked_for(check, flag):
    lines = check(lora(), flag, metadata={"ss_base_model_version": "sd_v1"})
    assert f"{TEXT}.alpha  number  mean |x| 1  1 .. 1" in lines
    assert f"{TEXT}.dora_scale  6x1  mean |x| 1  1 .. 1" in lines
    assert len(lines) == len(lora()) + 3
    assert "for Stable Diffusion 1.x (sd_v1)" in lines[-3]


def test_other_kinds(check):
    parts = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}
    tensors = {f"{TEXT}.{part}": torch.ones(shape, dtype=torch.bfloat16) for part, shape in parts.items()}
    lines = check(tensors | {f"{TEXT}.alpha": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert lines[-2] == "network.safetensors: LoHa for a model that it does not name, stored as bfloat16"
    assert lines[-1] == "text encoder: 1 layers, 5 tensors, rank 2, alpha 1, mean |x| 1"


@pytest.mark.parametrize(
    ("part", "shape", "kind"),
    [("oft_blocks", (2, 2, 3, 3), "BOFT"), ("oft_blocks", (2, 3, 3), "OFT"), ("a1.weight", (2, 2), "GLoRA")],
)
def test_kinds_that_no_tool_can_use_are_named(check, part, shape, kind):
    lines = check({f"{TEXT}.{part}": torch.ones(shape), f"{TEXT}.alpha": torch.tensor(1.0)})
    assert lines[-2].startswith(f"network.safetensors: {kind} for a model that it does not name")


def test_values_that_are_not_finite_are_named_and_exit_with_1(check, capsys):
    tensors = lora()
    tensors[f"{TEXT}.lora_down.weight"][1, 2] = torch.inf
    tensors[f"{UNET}.alpha"] = torch.tensor(torch.nan)
    with pytest.raises(SystemExit, match="1"):
        check(tensors)
    said = capsys.readouterr()
    assert f"{TEXT}.lora_down.weight  2x3  mean |x| 1.6  -3 .. 2  1 NOT FINITE" in said.out
    assert f"{UNET}.alpha  number  mean |x| nan  nan .. nan  1 NOT FINITE" in said.out
    assert f"error: 2 tensors hold values that are not finite: {TEXT}.lora_down.weight, {UNET}.alpha" in said.err


def test_files_that_are_no_network(check, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        check({"emb_params": torch.ones(1, 4)})
    assert "is no network's file" in capsys.readouterr().err
    for path in (tmp_path / "none.safetensors", tmp_path / "cut.safetensors"):
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "network.safetensors").read_bytes()[:-4])
        monkeypatch.setattr(sys, "argv", ["check_lora_weights.py", str(path)])
        with pytest.raises(SystemExit, match="2"):
            cli.run(check_lora_weights.main)
        assert f"error: {path}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_mistake(tmp_path):
    path: Path = tmp_path / "network.safetensors"
    save_file({f"{TEXT}_{n}.lora_up.weight": torch.ones(4, 2) for n in range(3000)}, path)
    command = f"{sys.executable} networks/check_lora_weights.py {path} | head -1"
    ended = run(["bash", "-c", f"cd {ROOT} && {command}"], 60)
    assert (ended.stderr, len(ended.stdout.splitlines())) == ("", 1)
