"""networks.oft: rotations, as other programs compute them, in files and in runs."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.models.family import Family
from networks import oft
from tests.lora_models import Transformer2DModel
from tests.test_base_weights import info, merged  # noqa: F401 - a fixture
from tests.tiny import make_model, stored

ROTATED = {"network_module": "networks.oft", "network_dim": 8, "network_alpha": 0.01}


@torch.no_grad()
def answer(model: Family) -> Tensor:
    model.eval()
    noisy = torch.linspace(-2, 2, 4 * 16 * 16).reshape(1, 4, 16, 16)
    condition = model.condition(model.encode_text(["sks, a red circle"]), torch.tensor([[32.0, 32, 0, 0, 32, 32]]))
    return model.denoise(noisy, torch.tensor([500]), condition)


def attached(model: Family, dim: int, alpha: float, **arguments: object) -> oft.OFTNetwork:
    """A network at work whose rotations are everything from small to cut off by alpha."""
    points = model.attach_points()
    network = oft.create_network(1.0, dim, alpha, None, points.text_encoder, points.unet, **arguments)
    network.apply_to(points.text_encoder, points.unet)
    torch.manual_seed(3)
    for number, module in enumerate(network.children()):
        nn.init.normal_(module.oft_blocks, std=(0.01, 0.1, 1.0)[number % 3])
    model.network = network
    return network.eval()


def dense(blocks: Tensor, alpha: float, weight: Tensor) -> Tensor:
    """The rotated weight as the paper has it, in float64."""
    number, size, _ = blocks.shape
    q = blocks.double() - blocks.double().mT
    q = q * min(1.0, alpha * len(weight) / max(q.norm().item(), 1e-30))
    identity = torch.eye(size, dtype=torch.float64)
    r = (identity + q) @ torch.linalg.inv(identity - q)
    rows = weight.double().reshape(number, size, -1)
    return torch.einsum("knm,knx->kmx", r, rows).reshape(weight.shape)


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_layers_compute_with_rotated_weights(multiplier):
    torch.manual_seed(1)
    unet = nn.ModuleDict({"mid": Transformer2DModel()})
    network = oft.create_network(multiplier, 2, 0.05, None, None, unet, enable_all_linear="true", enable_conv="True")
    assert {module.lora_name for module in network.children()} == {"lora_unet_mid_to_q", "lora_unet_mid_proj_in"}
    before = {name: (getattr(unet.mid, name).weight.detach().clone()) for name in ("to_q", "proj_in")}
    network.apply_to(None, unet)
    x = {"to_q": torch.randn(2, 3, 8), "proj_in": torch.randn(2, 6, 4, 5)}
    with torch.no_grad():
        for name, size in (("to_q", 0.03), ("proj_in", 3.0)):
            layer, module = getattr(unet.mid, name), getattr(network, f"lora_unet_mid_{name}")
            assert torch.equal(layer(x[name]), module.org_forward(x[name]))  # new
            nn.init.normal_(module.oft_blocks, std=size)
            weight = before[name]
            whole = weight + multiplier * (dense(module.oft_blocks, 0.05, weight) - weight)
            kind = nn.functional.linear if name == "to_q" else nn.functional.conv2d
            wanted = kind(x[name].double(), whole.double(), layer.bias.double())
            torch.testing.assert_close(layer(x[name]).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_lycoris_reads_the_file(tmp_path, family):
    """It reads those whose blocks are no larger than their number."""
    kohya = pytest.importorskip("lycoris.kohya")
    ours, theirs, plain = (make_model(family) for _ in range(3))
    network = attached(ours, 32, 0.02, enable_all_linear="True", enable_conv="True")
    assert any("in_layers" in name or "resnets" in name for name in network.state_dict())
    network.save_weights(tmp_path / "oft.safetensors")
    points = theirs.attach_points()
    made, _ = kohya.create_network_from_weights(
        1.0, str(tmp_path / "oft.safetensors"), None, points.text_encoder, points.unet
    )
    made.apply_to(points.text_encoder, points.unet, True, True)
    theirs.network = made.eval()
    assert (answer(ours) - answer(plain)).abs().max() > 0.01
    torch.testing.assert_close(answer(theirs), answer(ours), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("names", ["lora_unet_", "oft_unet_"])
def test_a_file_is_merged_and_read_at_any_strength(tmp_path, names):
    beside, merged = make_model(), make_model()
    network = attached(beside, 4, 0.02)
    tensors = {key.replace("lora_unet_", names): tensor.clone() for key, tensor in network.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "oft.safetensors")
    points = merged.attach_points()
    made, weights = oft.create_network_from_weights(
        0.7, tmp_path / "oft.safetensors", None, points.text_encoder, points.unet, for_inference=True
    )
    made.load_state_dict(weights)
    assert made.is_mergeable()
    made.merge_to(points.text_encoder, points.unet, weights)
    network.set_multiplier(0.7)
    torch.testing.assert_close(answer(merged), answer(beside), rtol=1e-4, atol=1e-5)
    network.set_multiplier(0.0)
    assert torch.equal(answer(beside), answer(make_model()))


@pytest.mark.parametrize("names", ["lora_unet_", "oft_unet_"])
def test_a_model_is_trained_upon_its_rotation(info, tmp_path, names):  # noqa: F811
    """Also with blocks that are larger than LyCORIS reads them."""
    beside = info().load()
    tensors = {key.replace("lora_unet_", names): t.clone() for key, t in attached(beside, 4, 0.02).state_dict().items()}
    save_file(tensors, tmp_path / "oft.safetensors")
    beside.network.set_multiplier(0.5)
    rotated = merged(info(), tmp_path / "oft.safetensors", strengths=(0.5,))
    assert (answer(rotated) - answer(info().load())).abs().max() > 0.01
    torch.testing.assert_close(answer(rotated), answer(beside), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_rotated_is_refused():
    points = make_model().attach_points()
    parts = points.text_encoder, points.unet
    for dim, alpha, arguments, why in (
        (
            7,
            1.0,
            {},
            r"network_dim 7 is the number of blocks and does not divide the \d+ outputs of .*: use 1, 2, 4, 8",
        ),
        (4, 0.0, {}, "alpha 0 lets OFT change nothing"),
        (4, 1.0, {"conv_dim": "4"}, "unknown network argument conv_dim; this network knows: enable_all_linear, en"),
        (4, 1.0, {"enable_convs": "True"}, "unknown network argument enable_convs; did you mean enable_conv?"),
        (4, 1.0, {"dropout": "abc"}, "the network's dropout must be at least 0 and below 1, not 'abc'"),
        (4, 1.0, {"enable_conv": "yes"}, "enable_conv must be True or False, not 'yes'"),
        (4, 1.0, {"neuron_dropout": 0.1}, "OFT has nothing that could be dropped out"),
    ):
        with pytest.raises(ValueError, match=why):
            oft.create_network(1.0, dim, alpha, None, *parts, **arguments)
    with pytest.raises(ValueError, match="there is no U-Net"):
        oft.create_network(1.0, 4, 1.0, None, points.text_encoder, None)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for tensors, why in (
        ({f"{name}.oft_blocks": torch.zeros(4, 3, 3)}, "has 4 blocks of 3x3, but the model's layer has 64 outputs"),
        ({f"{name}.lora_up.weight": torch.zeros(4, 3)}, "is no OFT"),
        ({f"{name}.oft_blocks": torch.zeros(2, 4, 16, 16)}, "is no OFT"),  # the butterfly of BOFT
        ({"lora_unet_other.oft_blocks": torch.zeros(4, 16, 16)}, "nothing in this OFT fits the model"),
    ):
        with pytest.raises(ValueError, match=why):
            oft.create_network_from_weights(1.0, None, None, *parts, tensors)


@pytest.mark.parametrize("argument", oft.ARGUMENTS)
def test_layers_that_a_file_lacks_are_refused(argument):
    points = make_model().attach_points()
    parts = points.text_encoder, points.unet
    more = oft.create_network(1.0, 4, 1.0, None, *parts, **{argument: "True"}).state_dict()
    again, _ = oft.create_network_from_weights(1.0, None, None, *parts, more, **{argument: "True"})
    assert again.state_dict().keys() == more.keys()
    for weights, asked in (
        (oft.create_network(1.0, 4, 1.0, None, *parts).state_dict(), argument),
        (more, next(other for other in oft.ARGUMENTS if other != argument)),
    ):
        with pytest.raises(ValueError, match=f"^{asked}: these weights have no layer of these"):
            oft.create_network_from_weights(1.0, None, None, *parts, weights, **{asked: "True"})


def test_norms_of_rotations_are_scaled_down():
    network = attached(make_model(), 4, 1.0)
    norms = [module.weight_norm().item() for module in network.children()]
    limit = sorted(norms)[len(norms) // 2]
    count, _, largest = network.apply_max_norm_regularization(limit)
    assert 0 < count.item() < len(norms)
    assert largest.item() == pytest.approx(limit, rel=1e-4)
    for module, norm in zip(network.children(), norms, strict=True):
        q = module.oft_blocks - module.oft_blocks.mT
        assert q.norm().item() == pytest.approx(min(norm, limit), rel=1e-4)


def test_a_run_resumes_and_goes_on_with_a_file(train, flags, tmp_path, capsys):
    words = ROTATED | {"save_state": True, "save_every_n_steps": 2, "ema": True, "gradient_checkpointing": True}
    words |= {"network_args": ("enable_all_linear=True", "enable_conv=True"), "text_encoder_lr": 1e-3}
    train(flags(tmp_path / "whole", **words))
    said = capsys.readouterr()
    assert "--text_encoder_lr has no effect: networks.oft has no part for the text encoder" in said.err
    assert "unet: weights changed, which were all 0 at first" in said.out
    train(flags(tmp_path / "broken", **words, resume=tmp_path / "whole" / "run-step00000002-state"))
    file = tmp_path / "whole" / "run.safetensors"
    for name in (file.name, "run-ema.safetensors"):
        assert stored(tmp_path / "broken" / name) == stored(tmp_path / "whole" / name)
    tensors = load_file(file)
    assert {name.partition(".")[2] for name in tensors} == {"alpha", "oft_blocks"}
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert all(tensor.abs().max() > 1e-4 for name, tensor in tensors.items() if name.endswith("oft_blocks"))
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.oft"

    old = {key.replace("lora_unet_", "oft_unet_"): tensor for key, tensor in tensors.items()}
    save_file(old, tmp_path / "old.safetensors")
    still = {"learning_rate": 1e-12, "max_train_steps": 1, "network_module": "networks.oft", "dim_from_weights": True}
    train(flags(tmp_path / "made", **still, network_weights=tmp_path / "old.safetensors"))
    saved = load_file(tmp_path / "made" / "run.safetensors")
    assert saved.keys() == tensors.keys()
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, tensors[key], rtol=0, atol=1e-6)


def test_a_network_of_text_encoders_alone_is_refused(train, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **ROTATED, network_train_text_encoder_only=True))
    assert "error: --network_train_text_encoder_only: networks.oft has no part for" in capsys.readouterr().err
