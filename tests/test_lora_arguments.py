"""The arguments of networks/lora.py: which layers have branches, of what size, and what is refused."""

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from networks.lora import ARGUMENTS, LoRANetwork, NetworkArguments, create_network, create_network_from_weights
from tests.lora_models import small_network, text_model
from tests.test_network_weights import write_lora
from tests.tiny import make_model

NAMES_OF_LARGE = ("conv1", "conv2", "samplers_0_conv")


def points(family: str = "sd1") -> tuple[nn.Module | list[nn.Module], nn.Module]:
    attached = make_model(family).attach_points()
    return attached.text_encoder, attached.unet


@pytest.fixture(scope="module")
def sd1() -> tuple[nn.Module, nn.Module]:
    return points()


def made(model: tuple[nn.Module, nn.Module], **arguments: object) -> LoRANetwork:
    return create_network(1.0, 3, 2.0, None, *model, **arguments)


def sizes(network: LoRANetwork) -> dict[str, tuple[int, float]]:
    return {lora.lora_name: (lora.lora_dim, lora.alpha.item()) for lora in network.children()}


def of_blocks(**own: object) -> str:
    """25 values, 1 but for those of some blocks: b4=7 is that of block 4."""
    values = ["1"] * 25
    for block, value in own.items():
        values[int(block[1:])] = str(value)
    return ",".join(values)


# Convolutions


def test_convolutions_have_sizes_of_their_own(sd1):
    plain, with_convolutions = sizes(made(sd1)), sizes(made(sd1, conv_dim="5", conv_alpha="0.5"))
    assert plain.items() <= with_convolutions.items()
    more = {name: size for name, size in with_convolutions.items() if name not in plain}
    large = {name: size for name, size in more.items() if name.endswith(NAMES_OF_LARGE)}
    assert {name.rpartition("resnets_")[2][2:] for name in more.keys() - large.keys()} == {
        "time_emb_proj",
        "conv_shortcut",
    }
    assert {more[name] for name in more.keys() - large.keys()} == {(3, 2.0)}
    assert len(large) == 18
    assert set(large.values()) == {(5, 0.5)}


def test_alpha_of_convolutions_is_1_and_0_is_their_rank(sd1):
    name = "lora_unet_mid_block_resnets_0_conv1"
    assert sizes(made(sd1, conv_dim="8"))[name] == (8, 1.0)
    assert sizes(made(sd1, conv_dim="8", conv_alpha="0"))[name] == (8, 8.0)


# Blocks


def test_ranks_of_blocks_are_those_of_their_layers_and_0_makes_none(sd1):
    found = sizes(made(sd1, block_dims=of_blocks(b1=6, b12=0), block_alphas=of_blocks(b1=0.25)))
    assert found["lora_unet_down_blocks_0_attentions_0_proj_in"] == (6, 0.25)
    assert found["lora_unet_up_blocks_1_attentions_1_proj_in"] == (1, 1.0)
    assert not [name for name in found if "mid_block" in name]
    assert {size for name, size in found.items() if name.startswith("lora_te_")} == {(3, 2.0)}


def test_alphas_of_blocks_are_those_of_the_network_unless_given(sd1):
    found = sizes(made(sd1, block_dims=of_blocks(b1=6), conv_block_dims=of_blocks(b1=7, b3=0), conv_alpha="0.5"))
    assert found["lora_unet_down_blocks_0_attentions_0_proj_in"] == (6, 2.0)
    assert found["lora_unet_down_blocks_0_resnets_0_conv1"] == (7, 0.5)
    assert found["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == (6, 2.0)
    assert "lora_unet_down_blocks_0_downsamplers_0_conv" not in found


def test_ranks_of_convolutions_in_blocks_leave_the_others_at_those_of_the_network(sd1):
    found = sizes(made(sd1, conv_block_dims=of_blocks(b1=7)))
    assert found["lora_unet_down_blocks_0_resnets_0_conv1"] == (7, 1.0)
    assert found["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == (3, 2.0)


def test_network_of_a_file_has_the_files_sizes_and_takes_arguments_that_say_so(sd1):
    arguments = {"conv_dim": "5", "conv_alpha": "0.5", "block_dims": of_blocks(b1=6)}
    network = made(sd1, **arguments)
    weights = network.state_dict()
    for own in ({}, arguments, {"conv_dim": "5"}):
        again, _ = create_network_from_weights(1.0, None, None, *sd1, weights, **own)
        assert sizes(again) == sizes(network)
    for wrong in ({"conv_dim": "4"}, {"conv_dim": "5", "conv_alpha": "1"}, {"block_dims": of_blocks()}):
        with pytest.raises(ValueError, match=r"in the file, but the arguments say .*: leave out"):
            create_network_from_weights(1.0, None, None, *sd1, weights, **wrong)


# Learning rates


def rates(network: LoRANetwork, text: float | None = 1e-5, unet: float | None = 1e-3) -> dict[str, float]:
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([text], unet, 1.0)
    assert len(names) == len(groups) == len(set(names))
    return dict(zip(names, (group["lr"] for group in groups), strict=True))


def trained(network: LoRANetwork) -> list[int]:
    """How many of its parameters are in no group, one, two ..."""
    groups, _ = network.prepare_optimizer_params(1.0, 1.0, 1.0)
    moved = [id(parameter) for group in groups for parameter in group["params"]]
    return sorted({moved.count(id(parameter)) for parameter in network.parameters()})


def test_rates_of_blocks(sd1):
    network = made(sd1, down_lr_weight="linear+.5", mid_lr_weight="2", up_lr_weight="1,0, 3", conv_dim="2")
    expected = {
        "text_encoder": 1e-5,
        "unet_block_01": (0.5 + 1 / 11) * 1e-3,
        "unet_block_03": (0.5 + 3 / 11) * 1e-3,
        "unet_block_04": (0.5 + 4 / 11) * 1e-3,
        "unet_block_12": 2e-3,
        "unet_block_13": 1e-3,
        "unet_block_15": 3e-3,
        "unet_block_16": 1e-3,
        "unet_block_17": 1e-3,
    }
    assert rates(network) == pytest.approx(expected)
    assert list(rates(network)) == list(expected)
    assert trained(network) == [1]
    assert not [name for name in sizes(network) if "up_blocks_0_resnets_1" in name]
    assert list(rates(network, unet=0)) == ["text_encoder"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sine", [0, 0.1951, 0.3827, 0.5556, 0.7071, 0.8315, 0.9239, 0.9808, 1]),
        ("cosine", [1, 0.9808, 0.9239, 0.8315, 0.7071, 0.5556, 0.3827, 0.1951, 0]),
        ("linear", [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]),
        ("reverse_linear+.25", [1.25, 1.125, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]),
        ("zeros + 0.5", [0.5] * 9),
    ],
)
def test_presets(text, expected):
    arguments = NetworkArguments.read({"down_lr_weight": text, "up_lr_weight": "2"}, ARGUMENTS, sdxl=True)
    assert arguments.block_weights == pytest.approx([1, *expected, 1, 1, 1, 2, *[1] * 8, 1], abs=5e-5)
    assert arguments.block_weights[9 if text == "cosine" else 1] == pytest.approx(
        expected[-1 if text == "cosine" else 0]
    )


def test_blocks_with_too_small_a_rate_have_no_branch(sd1):
    network = made(
        sd1, down_lr_weight="zeros", mid_lr_weight="0.2", up_lr_weight="sine+.2", block_lr_zero_threshold=".2"
    )
    assert list(rates(network)) == ["text_encoder", "unet_block_16", "unet_block_17"]
    again, _ = create_network_from_weights(1.0, None, None, *sd1, made(sd1).state_dict(), up_lr_weight="zeros")
    assert sizes(again) == sizes(made(sd1))
    assert list(rates(again)) == ["text_encoder", "unet_block_01", "unet_block_12"]


def test_lora_plus_moves_up_faster(sd1):
    both = made(sd1, loraplus_lr_ratio="16", loraplus_text_encoder_lr_ratio="4")
    assert rates(both) == {"text_encoder": 1e-5, "text_encoder_plus": 4e-5, "unet": 1e-3, "unet_plus": 1.6e-2}
    groups, names = both.prepare_optimizer_params(1.0, 1.0, 1.0)
    up = {id(lora.lora_up.weight) for lora in both.unet_loras}
    assert {id(parameter) for parameter in groups[names.index("unet_plus")]["params"]} == up
    assert trained(both) == [1]
    unet_only = made(sd1, loraplus_unet_lr_ratio="2", mid_lr_weight="3", up_lr_weight="zeros", down_lr_weight="zeros")
    assert rates(unet_only) == {"text_encoder": 1e-5, "unet_block_12": 3e-3, "unet_block_12_plus": 6e-3}
    several = small_network(sd1[1], text_encoder=[text_model(), text_model()], loraplus_lr_ratio="2")
    assert [name for name in rates(several) if "_2" in name] == ["text_encoder_2", "text_encoder_2_plus"]


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"conv_alpha": "1"}, "conv_alpha has no effect without conv_dim or conv_block_dims"),
        ({"block_alphas": of_blocks()}, "block_alphas has no effect without block_dims"),
        (
            {"conv_dim": "4", "conv_block_alphas": of_blocks()},
            "conv_block_alphas has no effect without conv_block_dims",
        ),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold has no effect without down_lr_weight or mid_lr"),
        ({"block_dims": "2,4"}, "block_dims: 2 values for the 25 blocks of Stable Diffusion 1 and 2's U-Net, give 25"),
        ({"block_dims": of_blocks(b3=-1)}, "block_dims must be a whole number from 0 to 65536, not '-1'"),
        ({"block_dims": of_blocks(b3=1.5)}, "block_dims must be a whole number from 0 to 65536, not '1.5'"),
        ({"block_dims": of_blocks(b3="")}, "block_dims must be a whole number from 0 to 65536, not ''"),
        ({"conv_dim": "4,4"}, "conv_dim must be a whole number from 0 to 65536, not '4,4'"),
        ({"conv_dim": "inf"}, "conv_dim must be a whole number from 0 to 65536, not 'inf'"),
        ({"conv_dim": "1e99"}, "conv_dim must be a whole number from 0 to 65536, not '1e99'"),
        (
            {"conv_dim": "0", "conv_alpha": "2"},
            "conv_alpha has no effect without conv_dim or conv_block_dims, a rank ab",
        ),
        ({"dora_wd": "False", "wd_on_output": "False"}, "wd_on_output has no effect without dora_wd, which makes DoRA"),
        ({"down_lr_weight": "sin"}, "down_lr_weight: there is no curve 'sin'; did you mean sine?"),
        ({"down_lr_weight": ""}, "down_lr_weight: there is no curve ''; use numbers or sine, cosine, linear"),
        ({"up_lr_weight": "1,x"}, "up_lr_weight must be a number of 0 or more, not 'x'"),
        ({"up_lr_weight": "1,-1"}, "up_lr_weight must be a number of 0 or more, not '-1'"),
        ({"up_lr_weight": "sine+x"}, "up_lr_weight: after sine+ there must be a number of 0 or more, not 'x'"),
        ({"up_lr_weight": "sine+"}, "up_lr_weight: after sine+ there must be a number of 0 or more, not ''"),
        ({"up_lr_weight": "sine+.5,1"}, "up_lr_weight: 'sine+.5,1' has more than one curve or number"),
        ({"up_lr_weight": "1,sine"}, "up_lr_weight: '1,sine' has more than one curve or number"),
        ({"up_lr_weight": "+.5"}, "up_lr_weight: '+.5' adds to no curve, as sine+0.5 does"),
        ({"mid_lr_weight": "1,1,1"}, "mid_lr_weight: 3 values for 1 blocks"),
        ({"mid_lr_weight": "sine"}, "mid_lr_weight: sine is a curve over several blocks"),
        ({"loraplus_lr_ratio": "0"}, "loraplus_lr_ratio must be above 0"),
        ({"rank_dropout": "1"}, "the network's rank_dropout must be at least 0 and below 1, not '1'"),
        ({"module_dropout": "-0.1"}, "the network's module_dropout must be at least 0 and below 1"),
    ],
)
def test_mistakes_are_named(sd1, arguments, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        made(sd1, **arguments)


def test_a_network_of_a_file_without_convolutions_refuses_ranks_for_them(sd1):
    plain, others = made(sd1).state_dict(), made(sd1, conv_dim="0").state_dict()
    assert plain.keys() < others.keys()
    ranks, nones = of_blocks(), of_blocks().replace("1", "0")
    for weights, arguments, lacking in (
        (plain, {"conv_dim": "8"}, "conv_dim: these weights have no 3x3 convolutions"),
        (others, {"conv_dim": "8"}, "conv_dim: these weights have no 3x3 convolutions"),
        (plain, {"conv_block_dims": ranks}, "conv_block_dims: these weights have no 3x3 convolutions"),
        (plain, {"conv_dim": "0"}, "conv_dim: these weights have no layers of ResNet blocks and samplers"),
        (plain, {"conv_block_dims": nones}, "conv_block_dims: these weights have no layers of ResNet blocks"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(lacking)}"):
            create_network_from_weights(1.0, None, None, *sd1, weights, **arguments)
    same, _ = create_network_from_weights(1.0, None, None, *sd1, others, conv_dim="0")
    assert same.state_dict().keys() == others.keys()


def test_network_without_branches_is_refused(sd1):
    with pytest.raises(ValueError, match="leave no layer to adapt"):
        create_network(1.0, 4, 1.0, None, None, sd1[1], block_dims=",".join(["0"] * 25))


def test_more_blocks_than_values_are_refused():
    unet = nn.ModuleDict({"down_blocks": nn.ModuleList(nn.Module() for _ in range(5))})
    unet["down_blocks"][4].attentions = nn.ModuleList(
        [type("Transformer2DModel", (nn.Sequential,), {})(nn.Linear(2, 2))]
    )
    assert sizes(create_network(1.0, 3, 2.0, None, None, unet))
    with pytest.raises(ValueError, match="more blocks than values can be given for"):
        create_network(1.0, 3, 2.0, None, None, unet, block_dims=of_blocks())


# What is said of whole runs


def test_blocks_without_a_rate_stay_in_a_file_as_they_are(train, flags, tmp_path):
    """Also those whose norms are above --scale_weight_norms."""
    source = write_lora(tmp_path / "lora.safetensors", "sd1")
    words = {"network_args": ("down_lr_weight=zeros", "mid_lr_weight=0"), "scale_weight_norms": 0.01}
    train(flags(tmp_path, network_weights=source, dim_from_weights=True, max_train_steps=1, **words))
    before, after = load_file(source), load_file(tmp_path / "run.safetensors")
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name]) and "alpha" not in name}
    assert still == {name for name in after if re.search("down_blocks|mid_block", name) and "alpha" not in name}


def test_what_has_no_effect_is_said(train, flags, tmp_path, capsys):
    few = "warning: --network_args: up_lr_weight has values for 1 of 12 blocks, the further ones have 1\n"
    for number, (part, arguments, said) in enumerate(
        (
            (
                "network_train_unet_only",
                ("train_norm=text_encoder", "loraplus_text_encoder_lr_ratio=2", "up_lr_weight=.5"),
                "train_norm, loraplus_text_encoder_lr_ratio: no effect, the text encoder is not trained\n",
            ),
            (
                "network_train_text_encoder_only",
                ("conv_dim=8", "up_lr_weight=.5", "train_norm=True"),
                "conv_dim, up_lr_weight: no effect, the U-Net is not trained\n",
            ),
        )
    ):
        changes = {part: True, "network_args": arguments}
        train(flags(tmp_path / str(number), max_train_steps=1, **changes))
        lines = capsys.readouterr().err
        assert lines.count(f"warning: --network_args: {said}") == 1
        assert lines.count(few) == 1
    train(flags(tmp_path / "all", max_train_steps=1, network_args=("train_norm=True", "loraplus_lr_ratio=2")))
    assert "no effect" not in capsys.readouterr().err
