"""--scale_weight_norms, and the optional calls of networks around a step."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.training.methods.network import NetworkMethod
from networks.lora import LoRAModule, LoRANetwork
from tests.tiny import read_log, scalars

TAGS = ("keys_scaled", "average_key_norm", "max_key_norm")


def network() -> LoRANetwork:
    """Branches of a linear layer and two convolutions, of norms that differ by far."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 9), "b": nn.Conv2d(4, 5, 3, padding=1), "c": nn.Conv2d(4, 7, 1)}
    loras = [LoRAModule(f"lora_unet_{name}", layer, lora_dim=3, alpha=2) for name, layer in layers.items()]
    for lora, size in zip(loras, (0.01, 3.0, 1.0), strict=True):
        nn.init.normal_(lora.lora_up.weight, std=size)
    return LoRANetwork(loras)


def products(loras: LoRANetwork) -> list[torch.Tensor]:
    """alpha / rank * up @ down, in full."""
    return [2 / 3 * lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1) for lora in loras.children()]


def test_only_what_is_above_the_norm_is_scaled_down_to_it():
    loras = network()
    before = [product.detach().clone() for product in products(loras)]
    norms = [float(product.norm()) for product in before]
    limit = sum(sorted(norms)[:2]) / 2  # above one of them
    kept = [parameter.detach().clone() for parameter in loras.lora_unet_a.parameters()]
    count, mean, largest = loras.apply_max_norm_regularization(limit, "cpu")
    assert norms[0] < limit < min(norms[1:])
    assert count.item() == 2
    for product, old, norm in zip(products(loras), before, norms, strict=True):
        assert torch.allclose(product, old * min(1, limit / norm), rtol=1e-5, atol=1e-7)
    assert all(map(torch.equal, kept, loras.lora_unet_a.parameters()))
    assert mean.item() == pytest.approx((norms[0] + 2 * limit) / 3)
    assert largest.item() == pytest.approx(limit)
    scaled, again = loras.lora_unet_b, network().lora_unet_b
    for now, then in zip(scaled.parameters(), again.parameters(), strict=True):
        assert torch.allclose(now, then * math.sqrt(limit / norms[1]))


def test_a_new_network_stays_as_it_is():
    loras = network()
    for lora in loras.children():
        nn.init.zeros_(lora.lora_up.weight)
    before = [parameter.detach().clone() for parameter in loras.parameters()]
    count, mean, largest = loras.apply_max_norm_regularization(1.0)
    assert (count.item(), mean.item(), largest.item()) == (0, 0, 0)
    assert all(map(torch.equal, before, loras.parameters()))


def test_a_run_stays_within_the_norm_and_logs_it(train, flags, tmp_path):
    changes = {"network_dim": 2, "network_alpha": 3, "max_train_steps": 3, "save_precision": "float"}
    train(flags(tmp_path, **changes, scale_weight_norms=0.05, logging_dir=tmp_path / "logs"))
    weights = load_file(tmp_path / "run.safetensors")
    names = [key.removesuffix(".alpha") for key in weights if key.endswith(".alpha")]
    pairs = [(weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]) for name in names]
    norms = [1.5 * float((up.flatten(1) @ down.flatten(1)).norm()) for up, down in pairs]
    log = read_log(tmp_path / "logs")
    scaled, mean, largest = (scalars(log, f"max_norm/{tag}") for tag in TAGS)
    assert max(norms) == pytest.approx(0.05, rel=1e-4)
    assert largest[3] == pytest.approx(max(norms), rel=1e-4)
    assert mean[3] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert 0 < scaled[3] <= len(names)


class _Foreign(nn.Module):
    """As other people's networks answer."""

    def __init__(self):
        super().__init__()
        self.weight, self.said = nn.Parameter(torch.ones(1)), []

    def apply_max_norm_regularization(self, max_norm, device):
        self.said.append((max_norm, device))
        return 2, 0.25, 0.5

    def update_grad_norms(self):
        self.said.append(float(self.weight.grad))


def test_networks_of_others_are_called_around_the_step():
    method = NetworkMethod.__new__(NetworkMethod)
    method.network, method.norms = _Foreign(), {}
    method.options = type("Options", (), {"scale_weight_norms": 0.7})
    method.network.weight.grad = torch.full((1,), 3.0)
    assert method.measured() == {}
    method.before_step()
    method.after_step(1)
    assert method.network.said == [3.0, (0.7, torch.device("cpu"))]
    assert method.measured() == dict(zip((f"max_norm/{tag}" for tag in TAGS), (2, 0.25, 0.5), strict=True))


def test_networks_that_cannot_do_it_are_refused(train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(LoRANetwork, "apply_max_norm_regularization")
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, scale_weight_norms=1))
    assert "--scale_weight_norms: networks of networks.lora cannot be scaled down, leave it out" in (
        capsys.readouterr().err
    )
