"""train_norm in networks/lora.py: which normalisations, what they compute, what their files say."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from networks.lora import NORMS, NormModule, create_network, create_network_from_weights, find_layers
from tests.test_base_weights import answer, parts
from tests.tiny import make_model

NORM_KINDS = {
    "layer": (lambda: nn.LayerNorm(24), (2, 5, 24)),
    "no bias": (lambda: nn.LayerNorm(24, bias=False), (5, 24)),
    "group": (lambda: nn.GroupNorm(4, 24), (2, 24, 3, 3)),
}


def randomised(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def norms_of(model: nn.Module, **arguments: object) -> list[str]:
    """The names of those that a network trains."""
    network = create_network(1.0, 2, 1.0, None, *parts(model), **arguments)
    return [module.lora_name for module in network.children() if isinstance(module, NormModule)]


def computed(norm: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_two_networks_add_to_weight_and_bias(kind):
    make, shape = NORM_KINDS[kind]
    norm, x = make(), torch.randn(shape)
    before = norm(x)
    networks = [NormModule(f"lora_unet_{multiplier}", norm, multiplier) for multiplier in (1.0, -0.5)]
    for module in networks:
        module.apply_to(norm)
    assert torch.equal(norm(x), before)
    for module in networks:
        randomised(module)
    weight, bias = norm.weight, norm.bias
    for module in networks:
        weight = weight + module.multiplier * module.w_norm
        bias = None if bias is None else bias + module.multiplier * module.b_norm
    torch.testing.assert_close(norm(x), computed(norm, x, weight, bias))
    norm(x).sum().backward()
    assert all(parameter.grad is not None for module in networks for parameter in module.parameters())
    for module in networks:
        module.multiplier = 0
    assert torch.equal(norm(x), before)


@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats_than_the_networks_are_kept(kind, dtype):
    make, shape = NORM_KINDS[kind]
    norm, x = make().to(dtype), torch.randn(shape)
    module = randomised(NormModule("lora_unet_a", norm))
    bias = None if norm.bias is None else norm.bias.float() + module.b_norm
    expected = computed(norm, x, norm.weight.float() + module.w_norm, bias)
    module.apply_to(norm)
    found = norm(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_normalisations_of_adapted_blocks_are_trained(family):
    model = make_model(family)
    names = norms_of(model, train_norm="True")
    assert len(names) == len(set(names))
    both, text = find_layers(*parts(model), kinds=NORMS), [name for name in names if name.startswith("lora_te")]
    assert set(names) < both.keys()
    layers = {name for name in both if name.startswith("lora_te") and "encoder_layers" in name}
    assert set(text) == layers
    blocks = {name for name in both if re.search(r"transformer_blocks|attentions_\d+_norm|_1_norm$", name)}
    assert set(names) - set(text) == blocks
    assert norms_of(model, train_norm="text_encoder") == text
    assert norms_of(model, train_norm="unet") == [name for name in names if name not in text]
    assert norms_of(model, train_norm="False") == norms_of(model) == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_files_make_the_same_network_and_merge(tmp_path, family):
    model, again, merged = (make_model(family) for _ in range(3))
    torch.manual_seed(1)
    network = randomised(create_network(0.7, 2, 1.0, None, *parts(model), train_norm=True))
    network.apply_to(*parts(model))
    expected, file = answer(model), tmp_path / "norms.safetensors"
    network.save_weights(file)
    made, weights = create_network_from_weights(0.7, file, None, *parts(again))
    assert weights.keys() == load_file(file).keys()
    made.apply_to(*parts(again))
    made.load_state_dict(weights)
    assert torch.equal(answer(again), expected)
    made.merge_to(*parts(merged), weights)
    torch.testing.assert_close(answer(merged), expected, rtol=1e-3, atol=1e-5)


def test_names_of_sdxl_in_diffusers_layout_are_those_of_the_original():
    model = make_model("sdxl")
    original = find_layers(None, model.attach_points().unet, kinds=NORMS)
    assert {name: id(norm) for name, norm in find_layers(None, model.unet, kinds=NORMS).items()} == {
        name: id(norm) for name, norm in original.items()
    }


def test_those_of_another_size_are_refused():
    model = make_model()
    network = create_network(1.0, 2, 1.0, None, *parts(model), train_norm="unet")
    weights = network.state_dict()
    key = next(key for key in weights if key.endswith("w_norm"))
    weights[key] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"{key} is 3 in the LoRA, but the model needs \d+"):
        create_network_from_weights(1.0, None, None, *parts(model), weights)


def test_those_of_a_file_that_are_left_out_are_said(train, flags, tmp_path, capsys):
    network = create_network(1.0, 4, 1.0, None, *parts(make_model()), train_norm=True)
    network.save_weights(tmp_path / "norms.safetensors")
    train(flags(tmp_path, network_weights=tmp_path / "norms.safetensors", max_train_steps=1))
    assert re.search(r"warning: \d+ of the \d+ modules in .* are not of this network", capsys.readouterr().err)


def test_the_first_group_norms_train_on_the_cpu(train, flags, tmp_path):
    """Where the input gets no gradients and has its channels last, torch's own backward pass ends the process."""
    words = {"network_args": "train_norm=unet", "network_train_unet_only": True, "learning_rate": 0.01}
    train(flags(tmp_path, **words, max_train_steps=2))
    moved = [t for key, t in load_file(tmp_path / "run.safetensors").items() if key.endswith("b_norm")]
    assert moved
    assert all(tensor.abs().max() > 0 for tensor in moved)
