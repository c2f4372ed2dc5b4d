"""networks/lora.py: names, arithmetic, precision, parameter groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from networks.lora import create_network, create_network_from_weights
from tests.lora_models import expected_weight, small_network, text_model, unet

# Names


@pytest.mark.parametrize("container", [list, nn.ModuleList])
def test_two_text_encoders_are_numbered_and_projections_left_alone(container):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(**sizes, vocab_size=16, projection_dim=8)
    encoders = container([CLIPTextModel(config), CLIPTextModelWithProjection(config)])
    network = create_network(1.0, 4, 1.0, None, encoders, None)
    names = [lora.lora_name for lora in network.text_encoder_loras]
    layers = ["self_attn_k_proj", "self_attn_v_proj", "self_attn_q_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    assert sorted(names) == sorted(
        f"lora_te{number}_text_model_encoder_layers_0_{layer}" for number in (1, 2) for layer in layers
    )


def test_new_network_takes_attention_blocks_and_no_large_kernels():
    names = [lora.lora_name for lora in small_network(unet()).children()]
    assert names == ["lora_unet_mid_proj_in", "lora_unet_mid_to_q"]


# Arithmetic


@pytest.mark.parametrize(
    ("rank", "alpha", "expected"),
    [(None, None, (4, 1.0)), (8, None, (8, 1.0)), (8, 0, (8, 8.0)), (8, 2.5, (8, 2.5))],
)
def test_rank_and_alpha_defaults(rank, alpha, expected):
    lora = create_network(1.0, rank, alpha, None, None, unet()).unet_loras[0]
    assert (lora.lora_dim, lora.alpha.item()) == expected
    assert lora.scale == expected[1] / expected[0]


def test_new_network_changes_nothing_and_moves_after_a_step():
    model, x = unet(), torch.randn(2, 5, 8)
    before = model["mid"].to_q(x)
    network = create_network(1.0, 2, 2.0, None, None, model)
    network.apply_to(None, model)
    assert torch.equal(model["mid"].to_q(x), before)
    model["mid"].to_q(x).sum().backward()
    lora = network.lora_unet_mid_to_q
    assert lora.lora_up.weight.grad.abs().sum() > 0
    assert lora.lora_down.weight.grad.abs().sum() == 0


def test_applied_networks_stack_and_follow_their_multipliers():
    model = unet()
    linear, conv = model["mid"].to_q, model["mid"].proj_in
    networks = [small_network(model, multiplier=m) for m in (0.5, 0.7)]
    for network in networks:
        network.apply_to(None, model)
    tokens, picture = torch.randn(2, 5, 8), torch.randn(2, 6, 3, 4)
    for multipliers in ((0.5, 0.7), (-0.3, 1.0), (0, 0.2)):
        for network, multiplier in zip(networks, multipliers, strict=True):
            network.set_multiplier(multiplier)
        linear_weight, conv_weight = linear.weight, conv.weight
        for network, multiplier in zip(networks, multipliers, strict=True):
            linear_weight = expected_weight(linear_weight, network.lora_unet_mid_to_q, multiplier)
            conv_weight = expected_weight(conv_weight, network.lora_unet_mid_proj_in, multiplier)
        torch.testing.assert_close(linear(tokens), F.linear(tokens, linear_weight.float(), linear.bias))
        torch.testing.assert_close(conv(picture), F.conv2d(picture, conv_weight.float(), conv.bias))
    for network in networks:
        network.set_multiplier(0)
    assert torch.equal(linear(tokens), F.linear(tokens, linear.weight, linear.bias))


def test_gradients_are_those_of_the_formula():
    model, x = unet(), torch.randn(2, 5, 8, requires_grad=True)
    network = small_network(model, multiplier=0.6)
    network.apply_to(None, model)
    layer, lora = model["mid"].to_q.requires_grad_(False), network.lora_unet_mid_to_q
    inputs = (x, lora.lora_down.weight, lora.lora_up.weight)
    weight = torch.randn(2, 5, 10)
    ours = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    plain = F.linear(x, layer.weight, layer.bias) + 0.6 / 2 * F.linear(F.linear(x, inputs[1]), inputs[2])
    for got, wanted in zip(ours, torch.autograd.grad((plain * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_dropout_acts_in_training_only():
    model, x = unet(), torch.randn(4, 8)
    network = small_network(model, neuron_dropout=0.9, dropout="0.5")
    network.apply_to(None, model)
    layer = model["mid"].to_q
    assert network.lora_unet_mid_to_q.dropout == 0.5
    assert not torch.equal(layer(x), layer(x))
    network.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("arguments", [{"dropout": "1"}, {"dropout": "lots"}, {"neuron_dropout": -0.1}])
def test_impossible_dropout_is_refused(arguments):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        small_network(unet(), **arguments)


def test_parts_that_are_not_applied_leave_the_network():
    text, model = text_model(), unet()
    network = small_network(model, text_encoder=text)
    network.apply_to(text, model, apply_text_encoder=False)
    assert network.text_encoder_loras == []
    assert all(key.startswith("lora_unet_") for key in network.state_dict())
    assert "forward" not in vars(text["text_model"]["mlp"].fc1)


def test_applying_twice_or_elsewhere_is_refused():
    model = unet()
    network = small_network(model)
    with pytest.raises(ValueError, match="no layer for lora_unet_mid_proj_in, lora_unet_mid_to_q"):
        network.apply_to(None, nn.Linear(1, 1))
    network.apply_to(None, model)
    with pytest.raises(RuntimeError, match="already applied"):
        network.apply_to(None, model)


def test_base_weights_stay_out_of_the_network():
    model = unet()
    network = small_network(model)
    network.apply_to(None, model)
    assert len(list(network.parameters())) == 4
    assert not {id(p) for p in network.parameters()} & {id(p) for p in model.parameters()}


def test_nothing_to_adapt_and_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="no attention or feed-forward layer"):
        create_network(1.0, 4, 1.0, None, None, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown network argument unit; this network knows: block_alphas, block_dims"):
        create_network(1.0, 4, 1.0, None, None, unet(), unit="1", dropout=None)
    with pytest.raises(ValueError, match=r"unknown network argument con_dim, unit; did you mean conv_dim\?"):
        create_network(1.0, 4, 1.0, None, None, unet(), unit="1", con_dim="4")
    with pytest.raises(ValueError, match="unknown network argument unit"):
        create_network_from_weights(1.0, None, None, None, unet(), {}, unit="1")


# Precision


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lora_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_keeps_the_layer_dtype(base_dtype, lora_dtype, autocast):
    model = unet()
    network = small_network(model)
    network.apply_to(None, model)
    x, picture = torch.randn(2, 5, 8), torch.randn(1, 6, 4, 4)
    wanted = model["mid"].to_q(x), model["mid"].proj_in(picture)
    model.to(base_dtype)
    network.to(lora_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = model["mid"].to_q(x.to(base_dtype)), model["mid"].proj_in(picture.to(base_dtype))
    for result, reference in zip(got, wanted, strict=True):
        assert result.dtype == (torch.bfloat16 if autocast else base_dtype)
        torch.testing.assert_close(result.float(), reference, rtol=0.03, atol=0.05)
    got[0].float().sum().backward()
    gradient = network.lora_unet_mid_to_q.lora_down.weight.grad
    assert gradient.dtype == lora_dtype
    assert gradient.abs().sum() > 0


def test_float32_branch_beside_a_half_precision_layer_computes_in_float32():
    model = unet().to(torch.float16)
    network = small_network(model)
    lora = network.lora_unet_mid_to_q
    nn.init.constant_(lora.lora_down.weight, 60.0)  # 8 x 60 x 200 = 96,000 is beyond float16
    nn.init.constant_(lora.lora_up.weight, 1e-3)
    network.apply_to(None, model)
    assert model["mid"].to_q(torch.full((1, 8), 200.0, dtype=torch.float16)).isfinite().all()


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_equals_the_formula(dtype):
    text, model = text_model(), unet().to(dtype)
    network = small_network(model, multiplier=0.7, text_encoder=text, network_alpha=3.0)
    layers = {
        "lora_te_text_model_mlp_fc1": text["text_model"]["mlp"].fc1,
        "lora_unet_mid_to_q": model["mid"].to_q,
        "lora_unet_mid_proj_in": model["mid"].proj_in,
    }
    wanted = {
        name: expected_weight(layer.weight, network.get_submodule(name), 0.7).to(layer.weight.dtype)
        for name, layer in layers.items()
    }
    assert network.is_mergeable()
    network.merge_to(text, model, network.state_dict())
    for name, layer in layers.items():
        assert layer.weight.requires_grad
        torch.testing.assert_close(layer.weight.detach(), wanted[name].detach())


def test_merging_rounds_through_the_wanted_dtype():
    model = unet()
    network = small_network(model)
    network.merge_to(None, model, network.state_dict(), dtype=torch.bfloat16, device="cpu")
    weight = model["mid"].to_q.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


# Optimizer


@pytest.mark.parametrize(
    ("text_encoder_lr", "unet_lr", "expected"),
    [
        (None, None, {"text_encoder": 1e-3, "unet": 1e-3}),
        (1e-5, 2e-4, {"text_encoder": 1e-5, "unet": 2e-4}),
        (0, None, {"unet": 1e-3}),
        (None, 0.0, {"text_encoder": 1e-3}),
    ],
)
def test_parameter_groups(text_encoder_lr, unet_lr, expected):
    network = small_network(unet(), text_encoder=text_model())
    groups, names = network.prepare_optimizer_params(text_encoder_lr, unet_lr, 1e-3)
    assert dict(zip(names, (group["lr"] for group in groups), strict=True)) == expected
    torch.optim.AdamW(groups)
    counts = {"text_encoder": 2, "unet": 4}
    assert [len(group["params"]) for group in groups] == [counts[name] for name in names]


@pytest.mark.parametrize(
    ("text_encoder_lrs", "expected"),
    [
        (None, {"text_encoder_1": 1e-3, "text_encoder_2": 1e-3, "unet": 2e-4}),
        ([], {"text_encoder_1": 1e-3, "text_encoder_2": 1e-3, "unet": 2e-4}),
        ([1e-5], {"text_encoder_1": 1e-5, "text_encoder_2": 1e-5, "unet": 2e-4}),
        ([1e-5, 3e-5], {"text_encoder_1": 1e-5, "text_encoder_2": 3e-5, "unet": 2e-4}),
        ([1e-5, None], {"text_encoder_1": 1e-5, "text_encoder_2": 1e-3, "unet": 2e-4}),
        ([0, 3e-5], {"text_encoder_2": 3e-5, "unet": 2e-4}),
        ([1e-5, 0], {"text_encoder_1": 1e-5, "unet": 2e-4}),
        ([0], {"unet": 2e-4}),
    ],
)
def test_each_text_encoder_has_its_own_rate(text_encoder_lrs, expected):
    network = small_network(unet(), text_encoder=[text_model(), text_model()])
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lrs, 2e-4, 1e-3)
    assert list(zip(names, (group["lr"] for group in groups), strict=True)) == list(expected.items())
    own = {f"text_encoder_{i}": network.get_submodule(f"lora_te{i}_text_model_mlp_fc1") for i in (1, 2)}
    for name, group in zip(names, groups, strict=True):
        if name in own:
            assert [id(p) for p in group["params"]] == [id(p) for p in own[name].parameters()]


def test_single_text_encoder_takes_the_first_of_several_rates():
    network = small_network(unet(), text_encoder=text_model())
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5, 3e-5], 0, 1e-3)
    assert (names, [group["lr"] for group in groups]) == (["text_encoder"], [1e-5])
