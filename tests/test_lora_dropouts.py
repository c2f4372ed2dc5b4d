"""The dropouts of networks/lora.py, and runs whose networks have structures of their own."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.models.registry import ModelInfo
from library.models.views import AttachPoints
from library.options import NetworkOptions
from library.training.methods.network import NetworkMethod
from networks.lora import LoRAModule, LoRANetwork
from tests.tiny import largest_difference, read_log, scalars, stored

LINEAR, CONVOLUTION = (nn.Linear(8, 64), (5, 3, 8)), (nn.Conv2d(8, 64, 3, padding=1), (5, 8, 4, 4))


def branch_of(layer: nn.Module, **dropouts: float) -> LoRAModule:
    """A branch that adds to what it is put beside, which adds nothing, the values between down and up."""
    lora = LoRAModule("lora_unet_a", layer, lora_dim=64, alpha=64, **dropouts)
    with torch.no_grad():
        lora.lora_up.weight.copy_(torch.eye(64).view(lora.lora_up.weight.shape))
    lora.org_forward = lambda x: torch.zeros_like(layer(x))
    return lora


@pytest.mark.parametrize(("layer", "size"), [LINEAR, CONVOLUTION])
def test_rank_dropout_takes_ranks_from_whole_samples(layer, size):
    torch.manual_seed(0)
    lora, x = branch_of(layer, rank_dropout=0.25), torch.randn(size)
    whole = lora.eval()(x)
    dropped = lora.train()(x)
    if x.dim() == 4:
        whole, dropped = whole.movedim(1, -1), dropped.movedim(1, -1)
    whole, dropped = whole.flatten(1, -2), dropped.flatten(1, -2)
    lost = (dropped == 0).all(1)
    assert torch.equal(lost, (dropped == 0).any(1))
    torch.testing.assert_close(dropped, whole / 0.75 * ~lost[:, None])
    assert 0.1 < lost.float().mean() < 0.4
    assert not torch.equal(lost[0], lost[1])


def test_module_dropout_takes_whole_branches():
    torch.manual_seed(0)
    layer, size = LINEAR
    lora, x = branch_of(layer, module_dropout=0.25), torch.randn(size)
    whole = lora.eval()(x)
    assert torch.equal(lora(x), whole)
    lora.train()
    results = [lora(x) for _ in range(80)]
    lost = [not result.any() for result in results]
    assert all(torch.equal(result, whole) for result, is_lost in zip(results, lost, strict=True) if not is_lost)
    assert 8 < sum(lost) < 32
    lora.module_dropout = 1 - 1e-9
    lora(x).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in lora.parameters())


def test_checkpointing_draws_the_same_again():
    layer, size = LINEAR
    lora, x = branch_of(layer, rank_dropout=0.5, module_dropout=0.5), torch.randn(size, requires_grad=True)
    gradients = []
    for run in (lora, lambda x: checkpoint(lora, x, use_reentrant=False)):
        torch.manual_seed(3)
        losses = [run(x).square().sum() for _ in range(8)]
        gradients.append(torch.autograd.grad(sum(losses), [x, *lora.parameters()]))
    assert gradients[0][0].any()
    assert all(map(torch.equal, *gradients))


ARGUMENTS = (
    *("conv_dim=2", "conv_alpha=1", "rank_dropout=0.2", "module_dropout=0.3", "loraplus_unet_lr_ratio=2"),
    *("down_lr_weight=linear+.5", "mid_lr_weight=0", "up_lr_weight=.5,1,1,1"),
)
RATES = {f"unet_block_{block:02d}": 0.01 * (0.5 + block / 11) for block in (1, 3, 4)}
RATES |= {"text_encoder": 0.01, "unet_block_13": 0.005, **{f"unet_block_{block}": 0.01 for block in range(14, 18)}}


def test_a_run_with_all_of_it_goes_on_where_it_was(train, flags, tmp_path):
    changes = {"network_args": ARGUMENTS, "save_state": True, "save_every_n_steps": 2, "scale_weight_norms": 0.2}
    changes |= {"save_precision": "float", "network_dropout": 0.1}
    common = {"gradient_checkpointing": True, **changes}
    train(flags(tmp_path / "whole", logging_dir=tmp_path / "logs", **common))
    train(flags(tmp_path / "resumed", **common, resume=tmp_path / "whole" / "run-step00000002-state"))
    train(flags(tmp_path / "plain", **changes))
    weights = stored(tmp_path / "whole" / "run.safetensors")
    assert stored(tmp_path / "resumed" / "run.safetensors") == weights
    assert stored(tmp_path / "plain" / "run.safetensors") == weights

    log = read_log(tmp_path / "logs")
    logged = {tag.removeprefix("lr/"): scalars(log, tag)[1] for tag in log.Tags()["scalars"] if tag.startswith("lr/")}
    plus = {f"{name}_plus": 2 * rate for name, rate in RATES.items() if name != "text_encoder"}
    assert logged == pytest.approx(RATES | plus)
    with safe_open(tmp_path / "whole" / "run.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"])["conv_dim"] == "2"
        keys = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
        norms = [
            (
                file.get_tensor(f"{key}.lora_up.weight").flatten(1)
                @ file.get_tensor(f"{key}.lora_down.weight").flatten(1)
            )
            .norm()
            .item()
            * file.get_tensor(f"{key}.alpha").item()
            / len(file.get_tensor(f"{key}.lora_down.weight"))
            for key in keys
        ]
    assert max(norms) == pytest.approx(0.2, rel=1e-4)
    assert "lora_unet_up_blocks_0_resnets_0_conv1" in keys
    assert not [key for key in keys if "mid_block" in key]


@pytest.mark.slow
def test_sdxl_and_optimizers_that_find_their_rate(train, flags, tmp_path, model_files):
    dims = ",".join(["2", *["3"] * 21, "2"])
    arguments = (f"block_dims={dims}", f"conv_block_dims={dims}", "up_lr_weight=sine+.5", "mid_lr_weight=.1,.2,.3")
    changes = {"pretrained_model_name_or_path": model_files("sdxl"), "network_args": arguments}
    changes |= {"optimizer_type": "Prodigy", "learning_rate": 1, "network_train_unet_only": True}
    train(flags(tmp_path, **changes, logging_dir=tmp_path / "logs"), script="sdxl_train_network")
    names = {tag for tag in read_log(tmp_path / "logs").Tags()["scalars"] if tag.startswith("lr/")}
    assert names >= {f"lr/unet_block_{block:02d}" for block in (2, 3, 4, 10, 11, 12, 13, 14)}
    weights = load_file(tmp_path / "run.safetensors")
    assert {len(tensor) for key, tensor in weights.items() if "lora_down" in key} == {3}
    assert all(tensor.any() for key, tensor in weights.items() if "lora_up" in key)


@pytest.mark.slow
def test_two_processes_that_drop_other_modules_train_what_one_does(train, flags, tmp_path, fork_server):
    changes = {"network_args": ("conv_dim=2", "module_dropout=0.6", "rank_dropout=0.2", "up_lr_weight=sine+.5")}
    changes |= {"train_batch_size": 1, "max_train_steps": 3, "save_precision": "float", "gradient_checkpointing": True}
    ended = fork_server.run(flags(tmp_path / "two", **changes), processes=2)
    assert ended.status == 0, ended.said
    train(flags(tmp_path / "one", **changes, gradient_accumulation_steps=2))
    one, two = tmp_path / "one" / "run.safetensors", tmp_path / "two" / "run.safetensors"
    assert largest_difference(one, two) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "by_chance"),
    [((), False), (("module_dropout=0", "rank_dropout=0.0"), False), (("module_dropout=.1",), True)],
)
def test_modules_are_left_out_by_chance_above_0_only(arguments, by_chance):
    method = NetworkMethod.__new__(NetworkMethod)
    method.network, method.default_rate = LoRANetwork([LoRAModule("lora_unet_a", nn.Linear(2, 2))]), 1e-3
    method.points = AttachPoints([nn.Module()], nn.Module())
    method.options = NetworkOptions(network_module="networks.lora", network_args=arguments)
    assert [group.by_chance for group in method.parameter_groups()] == [by_chance]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("conv_dims=4", "unknown network argument conv_dims; did you mean conv_dim?"),
        ("block_dims=1,2", "block_dims: 2 values for the 25 blocks of Stable Diffusion 1 and 2's U-Net, give 25"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_read(argument, said, train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ModelInfo, "load", None)  # so that nothing can be loaded
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, network_args=argument))
    assert f"error: --network_args: networks.lora refuses them: {said}" in capsys.readouterr().err
