"""networks.lora_fa: down stays as it was drawn, and is in files and states all the same."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from networks import lora_fa
from tests.lora_models import Transformer2DModel, randomise
from tests.test_network_weights import write_lora
from tests.test_processes import told, two  # noqa: F401 - a fixture
from tests.tiny import stored

FROZEN = {"network_module": "networks.lora_fa", "network_dim": 3, "network_alpha": 2}


def halves(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is down, and what is up."""
    parts = ("lora_down.weight", "lora_up.weight")
    return tuple({name: tensor for name, tensor in tensors.items() if name.endswith(part)} for part in parts)


def test_up_alone_is_moved_and_a_state_has_both(train, flags, tmp_path):
    """Down comes from a file here, so that it cannot be drawn again."""
    source = write_lora(tmp_path / "lora.safetensors", "sd1")
    words = FROZEN | {"network_weights": source, "save_state": True, "save_every_n_steps": 2, "ema": True}
    words |= {"scale_weight_norms": 0.5, "network_args": "rank_dropout=0.1", "gradient_checkpointing": True}
    train(flags(tmp_path / "whole", **words))
    source_weights = load_file(source)
    source.unlink()
    state = tmp_path / "whole" / "run-step00000002-state"
    train(flags(tmp_path / "broken", **words | {"network_weights": None}, resume=state))
    for name in ("run.safetensors", "run-ema.safetensors"):
        file = tmp_path / "whole" / name
        assert stored(tmp_path / "broken" / name) == stored(file)
        saved = load_file(file)
        assert saved.keys() == source_weights.keys()
        (down, up), (down_before, up_before) = halves(saved), halves(source_weights)
        for key, tensor in down.items():
            torch.testing.assert_close(tensor, down_before[key], rtol=0, atol=0)
        assert all((tensor - up_before[key]).abs().max() > 1e-3 for key, tensor in up.items())
    with safe_open(tmp_path / "whole" / "run.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora_fa"


def test_ranks_come_from_a_file_of_any_lora(train, flags, tmp_path):
    source = write_lora(tmp_path / "lora.safetensors", "sd1")
    still = {"learning_rate": 1e-12, "max_train_steps": 1, "dim_from_weights": True, "network_weights": source}
    train(flags(tmp_path, network_module="networks.lora_fa", **still))
    for key, tensor in load_file(tmp_path / "run.safetensors").items():
        torch.testing.assert_close(tensor, load_file(source)[key], rtol=0, atol=1e-6)


def network(**arguments: object) -> tuple[nn.Module, lora_fa.LoRAFANetwork]:
    torch.manual_seed(2)
    unet = nn.ModuleDict({"mid": Transformer2DModel()})
    made = lora_fa.create_network(1.0, 3, 2.0, None, None, unet, conv_dim=3, **arguments)
    made.apply_to(None, unet)
    return unet, made


def test_what_the_optimizer_gets_is_up():
    _, made = network()
    made.prepare_grad_etc(None, None)
    groups, _ = made.prepare_optimizer_params(None, None, 1e-4)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(module.lora_up.weight) for module in made.children()}
    assert trained == {id(parameter) for parameter in made.get_trainable_params()}


def test_nothing_of_the_layers_input_is_kept_for_the_backward_pass():
    unet, made = network()
    unet.requires_grad_(False)
    randomise(made)
    kept = []
    x = torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda t: t
    ):
        answer = unet.mid.to_q(x)
    assert tuple(x.shape) not in kept
    answer.sum().backward()
    assert made.lora_unet_mid_to_q.lora_up.weight.grad.abs().sum() > 0


def test_norms_are_scaled_down_by_up_alone():
    _, made = network()
    randomise(made)
    before = {module.lora_name: module.lora_down.weight.clone() for module in made.children()}
    norms = [module.weight_norm().item() for module in made.children()]
    limit = sorted(norms)[0] + 0.01
    made.apply_max_norm_regularization(limit)
    assert all(torch.equal(module.lora_down.weight, before[module.lora_name]) for module in made.children())
    for module, norm in zip(made.children(), norms, strict=True):
        assert module.weight_norm().item() == pytest.approx(min(norm, limit), rel=1e-4)


def test_rates_of_two_factors_are_refused():
    with pytest.raises(ValueError, match="unknown network argument loraplus_lr_ratio"):
        network(loraplus_lr_ratio="16")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["lora_fa", "dylora", "oft"])
def test_two_processes_stay_together(two, tmp_path, module):  # noqa: F811
    """Also where each of them draws ranks of its own."""
    changes = {"network_module": f"networks.{module}", "network_dim": 4}
    ended = two(tmp_path, "telling", max_train_steps=4, **changes)
    assert ended.status == 0, ended.said
    assert list(told(ended, "WEIGHTS").values()) == [2] * 4
