"""Frozen weights in 8 bits: what is kept so, how close it computes, and what training beside them is."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.errors import UserError
from library.models import float8
from library.models.family import Family
from library.options import FineTuneOptions, NetworkOptions, OptimizerOptions, PrecisionOptions
from library.training.device import frozen
from library.training.methods.finetune import FineTune
from library.training.methods.network import NetworkMethod
from tests import tiny
from tests.test_processes import told, two  # noqa: F401


def lora() -> NetworkMethod:
    return NetworkMethod(NetworkOptions("networks.lora"), OptimizerOptions())


def denoised(model: Family, dtype: torch.dtype = torch.float32, mixed: bool = False) -> tuple[torch.Tensor, ...]:
    """The U-Net's answer to given latents, and the gradient of the latents."""
    torch.manual_seed(3)
    latents = torch.randn(2, 4, 16, 12, dtype=dtype, requires_grad=True)
    text = {
        "hidden_state1": torch.randn(2, 77, 64),
        "hidden_state2": torch.randn(2, 77, 64),
        "pool2": torch.randn(2, 48),
    }
    if model.name == "sdxl":
        text["hidden_state1"] = text["hidden_state1"][..., :32]
    condition = model.condition(text, torch.full((2, 6), 32.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        answer = model.denoise(latents, torch.tensor([10, 700]), condition).float()
    answer.square().mean().backward()
    return answer.detach(), latents.grad.float()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_answer_is_close_and_only_large_weights_change(family):
    model = tiny.make_model(family).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    plain, _ = denoised(model)
    frozen.round_to_8_bits(PrecisionOptions(mixed_precision="bf16", fp8_base=True), lora(), model)
    rounded, _ = denoised(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    small = {name for name in before if after[name].dtype == torch.float8_e4m3fn}
    layers = [*model.unet.modules(), *model.text_encoders.modules()]
    # all but those that read and write latents
    assert len(small) == sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers) - 2
    assert not any("norm" in name or "token_embedding" in name or name.startswith("vae.") for name in small)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - small)
    assert 0 < (rounded - plain).norm() / plain.norm() < 0.12


def test_it_computes_what_the_rounded_weights_do_forward_and_backward():
    model = tiny.make_model().requires_grad_(False)
    other = copy.deepcopy(model)
    for layer in other.unet.modules():
        if float8.takes_8_bits(layer):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).float()
    float8.store_in_8_bits(model.unet)
    for mine, theirs in zip(denoised(model), denoised(other), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(denoised(model, mixed=True), denoised(other, mixed=True), strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_what_is_too_large_for_8_bits_becomes_the_largest():
    layer = nn.Linear(16, 16)
    layer.weight.data.fill_(-1000)
    layer.weight.data[0] = 1000
    float8.store_in_8_bits(layer)
    assert layer.weight.float().unique().tolist() == [-448, 448]


@pytest.mark.parametrize("mixed", [False, True])
def test_no_copy_in_half_precision_waits_for_the_backward_pass(mixed):
    layers = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32 * 16, 48))
    layers.to(torch.bfloat16).requires_grad_(False)
    float8.store_in_8_bits(layers)
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 16, 8, 8, dtype=torch.float32 if mixed else torch.bfloat16, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
        ),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        answer = layers(x)
    assert {tensor.dtype for tensor in kept if tensor.shape in ((32, 16, 3, 3), (48, 512))} == {torch.float8_e4m3fn}
    assert len(kept) == 2
    assert answer.dtype == torch.bfloat16
    answer.float().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_beside_it_learns_in_every_part(checkpointing):
    model = tiny.make_model().to(torch.bfloat16)
    frozen.round_to_8_bits(PrecisionOptions(mixed_precision="bf16", fp8_base=True), method := lora(), model)
    network = method.build(model)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.enable_gradient_checkpointing(text_encoders=True)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        condition = model.condition(model.encode_text(["a cat", "a dog"]), torch.zeros(2, 6))
        model.denoise(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), condition).float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_run_is_close_to_one_in_half_precision_and_says_what_it_was(train, flags, tmp_path):
    losses = {}
    for name, changes in {"plain": {}, "small": {"fp8_base": True, "gradient_checkpointing": True}}.items():
        log = {"logging_dir": tmp_path / f"{name}_log", "max_train_steps": 2, "mixed_precision": "bf16"}
        train(flags(tmp_path / name, **log, **changes))
        losses[name] = list(tiny.scalars(tiny.read_log(tmp_path / f"{name}_log"), "loss/current").values())
    assert losses["small"] != losses["plain"]
    assert losses["small"] == pytest.approx(losses["plain"], rel=0.03)
    with safe_open(tmp_path / "small" / "run.safetensors", "pt") as file:
        assert file.metadata()["ss_fp8_base"] == "True"


@pytest.mark.parametrize(
    ("script", "changes"),
    [("train_network", {}), ("train_textual_inversion", {"network_module": None, "token_string": "sks"})],
)
def test_it_needs_half_precision_to_compute_in(script, changes, train, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, fp8_base_unet=True, **changes), script=script)
    assert "--fp8_base_unet computes in half precision: add --mixed_precision bf16 or fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "method", "parts"),
    [
        ({}, lora, []),
        ({"fp8_base": True}, lora, ["unet", "text_encoder", "text_encoder_2"]),
        ({"fp8_base_unet": True}, lora, ["unet"]),
        ({"fp8_base": True}, lambda: FineTune(FineTuneOptions(), OptimizerOptions()), []),
    ],
)
def test_parts_of_the_model_that_it_applies_to(options, method, parts):
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert frozen.parts_in_8_bits(PrecisionOptions(**options), method(), names) == parts


def test_where_it_has_no_effect_is_said_and_where_it_cannot_work_refused(monkeypatch):
    said = []
    monkeypatch.setattr(frozen.console, "notice", said.append)
    monkeypatch.setattr(frozen.engines, "spreads", lambda accelerator: True)
    options, method = PrecisionOptions(fp8_base=True), FineTune(FineTuneOptions(), OptimizerOptions())
    frozen.check_8_bits(options, method, None)
    assert said == ["--fp8_base has no effect: weights that are trained cannot be kept in 8 bits"]
    with pytest.raises(UserError, match="--fp8_base: FSDP and DeepSpeed cannot spread weights of 8 bits"):
        frozen.check_8_bits(options, lora(), None)


@pytest.mark.slow
def test_two_processes_stay_together(two, tmp_path):  # noqa: F811
    ended = two(tmp_path, "telling", max_train_steps=2, mixed_precision="bf16", fp8_base=True)
    assert ended.status == 0, ended.said
    assert list(told(ended, "WEIGHTS").values()) == [2, 2]
