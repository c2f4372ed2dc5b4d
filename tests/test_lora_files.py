"""networks/lora.py: the files it writes and reads."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks.lora import create_network, create_network_from_weights, read_weights
from tests.lora_models import expected_weight, small_network, unet


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
    stray = {"lora_unet_elsewhere.lora_down.weight": torch.ones(1), "lora_unet_mid_to_q.other": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        _, selected = create_network_from_weights(1.0, None, None, None, model, weights | stray)
    assert selected.keys() == weights.keys()
    assert "lora_unet_elsewhere.lora_down.weight, lora_unet_mid_to_q.other" in caplog.text


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
