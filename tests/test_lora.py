"""networks/lora.py: names, arithmetic, precision, files."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from networks.lora import LoRAModule, LoRANetwork, create_network, create_network_from_weights, read_weights

SD1_KEYS = Path(__file__).parent / "data" / "lora_keys" / "sd1.tsv"


class Transformer2DModel(nn.Module):
    """Stands in for the Diffusers class of this name: one Linear, one 1x1 and one 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(6, 8, 1)
        self.to_q = nn.Linear(8, 10)
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)


class CLIPMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12)


def text_model() -> nn.Module:
    return nn.ModuleDict({"text_model": nn.ModuleDict({"mlp": CLIPMLP()})})


def unet() -> nn.Module:
    return nn.ModuleDict({"mid": Transformer2DModel(), "conv_out": nn.Conv2d(8, 4, 1)})


def randomise(network: LoRANetwork) -> LoRANetwork:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def small_network(model: nn.Module, **arguments: object) -> LoRANetwork:
    defaults = {"multiplier": 1.0, "network_dim": 2, "network_alpha": 1.0, "vae": None, "text_encoder": None}
    return randomise(create_network(**{**defaults, "unet": model, **arguments}))


def expected_weight(weight: torch.Tensor, lora: LoRAModule, multiplier: float) -> torch.Tensor:
    product = lora.lora_up.weight.double().flatten(1) @ lora.lora_down.weight.double().flatten(1)
    return weight.double() + multiplier * lora.alpha.item() / lora.lora_dim * product.view(weight.shape)


# Names


def published_shapes() -> dict[str, str]:
    with SD1_KEYS.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    shapes = {}
    for name, down, up, _block in rows:
        shapes |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": ""}
    return shapes


@pytest.fixture(scope="module")
def sd15() -> tuple[nn.Module, nn.Module]:
    """Text encoder and U-Net of SD 1.5 at full size, without weights."""
    text_config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.device("meta"):
        return CLIPTextModel(text_config), UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@pytest.mark.parametrize("with_text_model_level", [False, True])
def test_names_and_shapes_are_the_published_ones(sd15, with_text_model_level):
    text_encoder, full_unet = sd15
    if with_text_model_level:
        text_encoder = nn.ModuleDict({"text_model": text_encoder})
    network = create_network(1.0, 4, 1.0, None, text_encoder, full_unet)
    shapes = {key: "x".join(map(str, tensor.shape)) for key, tensor in network.state_dict().items()}
    assert shapes == published_shapes()
    assert len(network.text_encoder_loras) == 72
    assert len(network.unet_loras) == 192


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
    with pytest.raises(ValueError, match="unknown network argument conv_dim, unit; this network knows: dropout"):
        create_network(1.0, 4, 1.0, None, None, unet(), unit="1", conv_dim="4", dropout=None)
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


# Files


def test_file_holds_the_documented_tensors_and_nothing_is_left_over(tmp_path):
    network = small_network(unet(), network_alpha=0.5)
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {"ss_network_dim": "2"})
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == network.state_dict().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["lora_unet_mid_proj_in.lora_down.weight"].shape == (2, 6, 1, 1)
    assert tensors["lora_unet_mid_proj_in.lora_up.weight"].shape == (8, 2, 1, 1)
    assert tensors["lora_unet_mid_to_q.alpha"].shape == ()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt"])
@pytest.mark.parametrize("metadata", [None, {"key": "value"}])
def test_saved_network_loads_to_the_same_output(tmp_path, name, metadata):
    model, x = unet(), torch.randn(2, 8)
    network = small_network(model, network_dim=3, network_alpha=2.0)
    network.save_weights(tmp_path / name, metadata=metadata)
    other = small_network(model, network_dim=3, network_alpha=1.0)
    other.load_weights(tmp_path / name)
    assert other.lora_unet_mid_to_q.scale == 2.0 / 3
    loaded, _ = create_network_from_weights(1.0, tmp_path / name, None, None, model)
    loaded.load_weights(tmp_path / name)
    outputs = []
    for each in (network, other, loaded):
        each.apply_to(None, model)
        outputs.append(model["mid"].to_q(x))
        each.set_multiplier(0)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@settings(max_examples=25, deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    )
)
def test_same_content_gives_the_same_bytes_whatever_the_metadata(tmp_path_factory, metadata):
    network = create_network(1.0, 1, 1.0, None, None, unet())
    folder = tmp_path_factory.mktemp("lora")
    network.save_weights(folder / "a.safetensors", metadata=metadata)
    network.save_weights(folder / "b.safetensors", metadata=dict(reversed(metadata.items())))
    data = (folder / "a.safetensors").read_bytes()
    assert data == (folder / "b.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header.get("__metadata__", {})) == sorted(metadata)
    with safe_open(folder / "a.safetensors", "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert torch.equal(file.get_tensor("lora_unet_mid_to_q.alpha"), torch.tensor(1.0))


def test_failed_save_leaves_the_old_file_alone(tmp_path):
    network = small_network(unet())
    network.save_weights(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(Exception, match="str"):
        network.save_weights(tmp_path / "a.safetensors", metadata={"key": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_ranks_alphas_and_kernels_come_from_the_file():
    model = unet()
    model["mid"].requires_grad_(False)
    weights = {
        "lora_unet_mid_to_q.lora_down.weight": torch.randn(3, 8),
        "lora_unet_mid_to_q.lora_up.weight": torch.randn(10, 3),
        "lora_unet_mid_conv.lora_down.weight": torch.randn(5, 6, 3, 3),
        "lora_unet_mid_conv.lora_up.weight": torch.randn(8, 5, 1, 1),
        "lora_unet_mid_conv.alpha": torch.tensor([2.0]),
    }
    network, weights = create_network_from_weights(0.5, None, None, None, model, weights, for_inference=True)
    network.apply_to(None, model)
    network.load_state_dict(weights)
    linear, conv = network.lora_unet_mid_to_q, network.lora_unet_mid_conv
    assert (linear.lora_dim, linear.scale, conv.lora_dim, conv.scale) == (3, 1.0, 5, 0.4)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    picture = torch.randn(1, 6, 8, 8)
    weight = expected_weight(model["mid"].conv.weight, conv, 0.5).float()
    wanted = F.conv2d(picture, weight, model["mid"].conv.bias, stride=2, padding=1)
    torch.testing.assert_close(model["mid"].conv(picture), wanted, rtol=1e-4, atol=1e-4)


def test_keys_without_a_layer_are_named_and_left_out(caplog):
    model = unet()
    weights = small_network(model).state_dict()
    stray = {"lora_unet_elsewhere.lora_down.weight": torch.ones(1), "lora_unet_mid_to_q.dora_scale": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        _, selected = create_network_from_weights(1.0, None, None, None, model, weights | stray)
    assert selected.keys() == weights.keys()
    assert "lora_unet_elsewhere.lora_down.weight, lora_unet_mid_to_q.dora_scale" in caplog.text


def test_weights_of_another_model_are_refused():
    model = unet()
    with pytest.raises(ValueError, match="nothing in this LoRA fits the model: other"):
        create_network_from_weights(1.0, None, None, None, model, {"other.alpha": torch.tensor(1.0)})
    weights = small_network(model).state_dict()
    weights["lora_unet_mid_to_q.lora_down.weight"] = torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"lora_unet_mid_to_q is 2x9 and 10x2 in the LoRA.* needs 2x8 and 10x2"):
        create_network_from_weights(1.0, None, None, None, model, weights)


def test_loading_into_a_network_says_what_does_not_fit(tmp_path, caplog):
    model, file = unet(), tmp_path / "lora.safetensors"
    small_network(model, network_dim=3).save_weights(file)
    with pytest.raises(ValueError, match="is 3x6x1x1, but this network, at its rank, needs 2x6x1x1"):
        small_network(model).load_weights(file)

    weights = small_network(model).state_dict()
    save_file({k: v for k, v in weights.items() if "to_q" in k and "alpha" not in k} | {"x.y": torch.ones(1)}, file)
    network = small_network(model)
    with caplog.at_level(logging.WARNING):
        network.load_weights(file)
    assert network.lora_unet_mid_to_q.scale == 1.0  # without an alpha it is the rank
    assert "nothing for lora_unet_mid_proj_in" in caplog.text
    assert "no such module: x" in caplog.text

    save_file({"x.y": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="none of its 1 tensors"):
        network.load_weights(file)


def test_pickles_with_more_than_tensors_are_refused(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "lora.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read_weights(tmp_path / "lora.pt")


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
