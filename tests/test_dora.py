"""DoRA in networks/lora.py: formula, precision, gradients, files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.models.float8 import store_in_8_bits
from networks.lora import (
    DoRAModule,
    InputDoRAModule,
    LoRANetwork,
    create_network,
    create_network_from_weights,
    find_layers,
)
from tests.lora_models import small_network, unet
from tests.test_base_weights import answer, parts
from tests.test_diffusers_compat import load_pipeline, make_pipeline, paint
from tests.tiny import largest_difference, make_model, stored

KINDS = pytest.mark.parametrize("kind", [DoRAModule, InputDoRAModule])
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (2, 5, 24)),
    "no bias": (lambda: nn.Linear(24, 40, bias=False), (3, 24)),
    "convolution": (lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 7, 5)),
}


def randomised(network: nn.Module) -> nn.Module:
    """Far from the beginning, with magnitudes above zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("dora_scale"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                nn.init.normal_(parameter, std=0.3)
    return network


def branch(kind: type[DoRAModule], layer: nn.Module, multiplier: float = 1.0) -> DoRAModule:
    return randomised(kind("lora_unet_a", layer, multiplier, 3, 2.0))


def decomposed(module: DoRAModule, weight: Tensor, multiplier: float) -> Tensor:
    """The weight of the formula, in float64; gradients take the norm as a constant."""
    weight, down = weight.double(), module.lora_down.weight.double().flatten(1)
    turned = weight + 2 / 3 * (module.lora_up.weight.double().flatten(1) @ down).view(weight.shape)
    kept = 1 if isinstance(module, InputDoRAModule) else 0
    others = [axis for axis in range(weight.dim()) if axis != kept]
    norms = torch.linalg.vector_norm(turned.detach(), dim=others, keepdim=True)
    return weight + multiplier * (module.dora_scale.double() * turned / norms - weight)


def computed(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, layer.stride, layer.padding)


@KINDS
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_outputs_and_gradients_are_those_of_the_formula(kind, name, multiplier):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().requires_grad_(False), torch.randn(shape, requires_grad=True)
    module = branch(kind, layer, multiplier)
    expected = computed(layer, decomposed(module, layer.weight, multiplier), x)
    inputs, cotangent = (x, *module.parameters()), torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    module.apply_to(layer)
    found = layer(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad((found * cotangent).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("name", LAYERS)
def test_a_new_one_changes_no_bit_and_its_magnitudes_learn_at_once(kind, name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    module = kind("lora_unet_a", layer, 1.0, 3, 2.0)
    module.apply_to(layer)
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert all(module.get_parameter(part).grad.abs().min() > 0 for part in ("dora_scale", "lora_up.weight"))


@KINDS
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("storage", ["8 bits", "bfloat16"])
def test_weights_of_few_bits_are_computed_with_as_they_are(kind, name, storage):
    """Under autocast the error is that of its format, as it is without a network."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    if storage == "8 bits":
        store_in_8_bits(layer)
    else:
        layer.to(torch.bfloat16)
    module = branch(kind, layer)
    expected = computed(layer, decomposed(module, layer.weight, 1.0), x)
    module.apply_to(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).abs().max() < 0.015 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@KINDS
def test_networks_beside_each_other_add_up_in_any_order(kind):
    layer, x = nn.Linear(24, 40), torch.randn(5, 24)
    plain = layer(x)
    changes = []
    for seed in range(2):
        torch.manual_seed(seed)
        alone = nn.Linear(24, 40)
        alone.load_state_dict(layer.state_dict())
        branch(kind, alone).apply_to(alone)
        changes.append(alone(x) - plain)
    for seed in range(2):
        torch.manual_seed(seed)
        torch.nn.Linear(24, 40)
        branch(kind, layer).apply_to(layer)
    torch.testing.assert_close(layer(x), plain + sum(changes), rtol=1e-4, atol=1e-5)


def attached(family: str, on_output: bool = True) -> tuple[nn.Module, LoRANetwork]:
    model = make_model(family)
    torch.manual_seed(1)
    made = create_network(0.7, 2, 1.0, None, *parts(model), dora_wd="True", wd_on_output=str(on_output))
    network = randomised(made)
    network.apply_to(*parts(model))
    return model, network


@pytest.mark.parametrize("on_output", [True, False])
def test_a_file_makes_the_same_network_and_merges_into_the_same_model(tmp_path, on_output):
    model, network = attached("sd1", on_output)
    expected, file = answer(model), tmp_path / "dora.safetensors"
    network.save_weights(file)
    again, merged = make_model(), make_model()
    made, weights = create_network_from_weights(0.7, file, None, *parts(again))
    made.apply_to(*parts(again))
    made.load_state_dict(weights)
    assert torch.equal(answer(again), expected)
    made.merge_to(*parts(merged), weights)
    torch.testing.assert_close(answer(merged), expected, rtol=1e-3, atol=1e-5)
    assert (answer(make_model()) - expected).abs().max() > 1e-2


def test_magnitudes_are_saved_as_exactly_as_they_were_trained(tmp_path):
    model = unet()
    network = small_network(model, dora_wd=True)
    network.save_weights(tmp_path / "lora.safetensors", torch.bfloat16)
    for key, tensor in load_file(tmp_path / "lora.safetensors").items():
        assert tensor.dtype == (torch.float32 if key.endswith("dora_scale") else torch.bfloat16)


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_lycoris_computes_the_same_with_our_files_and_we_with_its(tmp_path, family):
    kohya = pytest.importorskip("lycoris.kohya")
    model, network = attached(family)
    network.set_multiplier(1.0)
    network.save_weights(tmp_path / "ours.safetensors")
    other = make_model(family)
    theirs, _ = kohya.create_network_from_weights(1.0, str(tmp_path / "ours.safetensors"), None, *parts(other))
    theirs.apply_to(*parts(other), True, True)
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-3, atol=1e-5)

    model, own = make_model(family), make_model(family)
    arguments = {"algo": "locon", "dora_wd": "True", "train_norm": "True", "conv_dim": 2}
    made = kohya.create_network(1.0, 2, 1.0, None, *parts(model), **arguments)
    made.apply_to(*parts(model), True, True)
    randomised(made).save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {})
    kinds = {key.partition(".")[2] for key in load_file(tmp_path / "theirs.safetensors")}
    assert {"dora_scale", "w_norm", "b_norm"} < kinds
    ours, weights = create_network_from_weights(1.0, tmp_path / "theirs.safetensors", None, *parts(own))
    assert weights.keys() == load_file(tmp_path / "theirs.safetensors").keys()
    ours.apply_to(*parts(own))
    ours.load_state_dict(weights)
    torch.testing.assert_close(answer(own), answer(model), rtol=1e-3, atol=1e-5)
    assert (answer(make_model(family)) - answer(own)).abs().max() > 1e-2


def test_peft_paints_the_same_with_these_weights(tmp_path):
    """Under its own names: Diffusers takes the magnitudes away from files with ours."""
    make_pipeline().save_pretrained(tmp_path / "model")
    ours, theirs = (load_pipeline(tmp_path / "model") for _ in range(2))
    torch.manual_seed(3)
    network = randomised(create_network(1.0, 4, 4.0, None, ours.text_encoder, ours.unet, dora_wd=True))
    plain = paint(ours)
    network.apply_to(ours.text_encoder, ours.unet)
    tensors = {}
    for prefix, model in (("unet", theirs.unet), ("text_encoder", theirs.text_encoder)):
        for path, layer in model.named_modules():
            start = "lora_unet_" if prefix == "unet" else "lora_te_text_model_"
            module = getattr(network, start + path.replace(".", "_"), None)
            if module is not None:
                tensors |= {f"{prefix}.{path}.lora_{a}.weight": p for a, p in zip("AB", factors(module), strict=True)}
                scale = module.dora_scale.detach()
                shaped = scale.flatten() if isinstance(layer, nn.Linear) else scale.view(1, -1, 1, 1)
                tensors[f"{prefix}.{path}.lora_magnitude_vector.weight"] = shaped.contiguous()
    theirs.load_lora_weights(tensors)
    applied = paint(ours)
    assert abs(applied - plain).mean() > 4
    assert abs(applied - paint(theirs)).max() < 0.2


def factors(module: DoRAModule) -> tuple[Tensor, Tensor]:
    return module.lora_down.weight.detach(), module.lora_up.weight.detach()


@pytest.mark.parametrize("decomposed", [True, False])
def test_files_of_the_other_kind_are_refused(tmp_path, decomposed):
    model, file = unet(), tmp_path / "lora.safetensors"
    small_network(model, dora_wd=decomposed).save_weights(file)
    kinds = ("a DoRA and this network a plain LoRA", "a plain LoRA and this network a DoRA")
    with pytest.raises(ValueError, match=f"{kinds[not decomposed]}: create it with dora_wd={decomposed}"):
        small_network(model, dora_wd=not decomposed).load_weights(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dora_wd": "maybe"}, "dora_wd must be True or False, not 'maybe'"),
        ({"wd_on_output": "False"}, "wd_on_output has no effect without dora_wd, which makes DoRA"),
        ({"train_norm": "vae"}, "train_norm must be True, False, unet or text_encoder, not 'vae'"),
    ],
)
def test_mistakes_in_arguments_are_said(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_network(unet(), **arguments)


def test_magnitudes_of_another_size_are_refused():
    model = unet()
    weights = small_network(model, dora_wd=True).state_dict()
    weights["lora_unet_mid_to_q.dora_scale"] = torch.ones(8, 1)
    with pytest.raises(ValueError, match=r"lora_unet_mid_to_q.dora_scale is 8x1 .* needs 10x1 or 1x8"):
        create_network_from_weights(1.0, None, None, None, model, weights)
    plain = small_network(model).state_dict()
    with pytest.raises(ValueError, match="dora_wd: these weights have no dora_scale"):
        create_network_from_weights(1.0, None, None, None, model, plain, dora_wd=True)


def test_scaled_weight_norms_leave_magnitudes_alone():
    network = randomised(create_network(1.0, 2, 1.0, None, None, unet(), dora_wd=True, train_norm=True))
    kept = {name: p.clone() for name, p in network.named_parameters() if "lora_" not in name.partition(".")[2]}
    scaled, _, largest = network.apply_max_norm_regularization(0.01)
    assert scaled == 2
    assert largest <= 0.01
    assert kept
    assert all(torch.equal(network.get_parameter(name), before) for name, before in kept.items())


# whole runs

DORA = {"network_args": ("dora_wd=True", "train_norm=True"), "learning_rate": 0.01}


def test_a_run_that_is_resumed_is_the_whole_one(train, flags, tmp_path):
    common = {**DORA, "save_state": True, "ema": True, "network_dropout": 0.2, "save_every_n_steps": 2}
    train(flags(tmp_path / "whole", **common, max_train_steps=4))
    train(flags(tmp_path / "rest", **common, max_train_steps=4, resume=tmp_path / "whole" / "run-step00000002-state"))
    whole, rest = (tmp_path / name / "run.safetensors" for name in ("whole", "rest"))
    assert stored(whole) == stored(rest)
    tensors = load_file(whole)
    assert {"dora_scale", "w_norm", "b_norm"} < {key.partition(".")[2] for key in tensors}
    assert any(key.startswith("lora_te_") and key.endswith(".b_norm") for key in tensors)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if key.endswith("w_norm"))


def test_runs_go_on_from_files_and_refuse_plain_ones(train, flags, tmp_path, capsys):
    words = {**DORA, "network_train_unet_only": True, "fp8_base": True, "mixed_precision": "bf16"}
    train(flags(tmp_path / "first", **words, max_train_steps=2))
    file = tmp_path / "first" / "run.safetensors"
    assert all(key.startswith("lora_unet_") for key in load_file(file))
    still = {"learning_rate": 1e-12, "max_train_steps": 1, "network_weights": file}
    train(flags(tmp_path / "again", **{**words, **still}))
    assert largest_difference(file, tmp_path / "again" / "run.safetensors") < 1e-6
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "plain", network_train_unet_only=True, **still))
    assert "is a DoRA and this network is none: give --network_args dora_wd=True" in capsys.readouterr().err
    train(flags(tmp_path / "made", **{**words, **still, "network_args": None}, dim_from_weights=True))
    assert largest_difference(file, tmp_path / "made" / "run.safetensors") < 1e-6


def test_a_dry_run_needs_no_weights(train, flags, tmp_path, capsys):
    train(flags(tmp_path / "out", **DORA, dry_run=True))
    assert "this was a dry run" in capsys.readouterr().out


def test_what_is_merged_first_is_what_magnitudes_are_of(train, flags, tmp_path):
    """--base_weights takes these files, in their order, and a new network starts from the sum."""
    _, network = attached("sd1")
    network.save_weights(tmp_path / "base.safetensors")
    words = {**DORA, "base_weights": tmp_path / "base.safetensors", "learning_rate": 1e-12, "max_train_steps": 1}
    train(flags(tmp_path / "out", **words))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    merged = make_model()
    weights = load_file(tmp_path / "base.safetensors")
    LoRANetwork(()).merge_to(*parts(merged), weights)
    after, before = (
        find_layers(None, model.unet)[name].weight.norm(dim=1, keepdim=True) for model in (merged, make_model())
    )
    scale = load_file(tmp_path / "out" / "run.safetensors")[f"{name}.dora_scale"]
    torch.testing.assert_close(scale, after, rtol=1e-3, atol=0)
    assert not torch.allclose(scale, before, rtol=0.05)


def test_magnitudes_in_bf16_are_said(train, flags, tmp_path, capsys):
    words = {"full_bf16": True, "mixed_precision": "bf16", "max_train_steps": 1}
    for arguments, times in ((("dora_wd=True",), 1), (None, 0)):
        train(flags(tmp_path / str(times), **words, network_args=arguments))
        assert capsys.readouterr().err.count("--full_bf16: the magnitudes of this DoRA are trained in bf16") == times
