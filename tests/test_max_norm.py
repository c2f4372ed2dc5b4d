"""--scale_weight_norms, and the optional calls of networks around a step."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.models.registry import ModelInfo
from library.options import NetworkOptions
from library.training import companions
from library.training.methods.network import NetworkMethod
from networks.lora import LoRAModule, LoRANetwork
from tests.tiny import read_log, scalars, stored

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


def test_roundings_in_half_precision_keep_within_the_norm():
    for limit in (0.3, 0.7, 1.1, 1.9):
        loras = network().to(torch.bfloat16)
        for lora in loras.children():
            lora.lora_up.weight.data.mul_(100)
        _, _, largest = loras.apply_max_norm_regularization(limit)
        norms = [lora.weight_norm().item() for lora in loras.children()]
        assert max(norms) <= limit
        assert min(norms) > 0.98 * limit
        assert largest.item() == pytest.approx(max(norms), rel=0.01)
        assert loras.apply_max_norm_regularization(limit)[0].item() == 0


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
    method.options = NetworkOptions(network_module="own", scale_weight_norms=0.7)
    method.network.weight.grad = torch.full((1,), 3.0)
    assert method.measured() == {}
    method.before_step()
    method.after_step(1)
    assert method.network.said == [3.0, (0.7, torch.device("cpu"))]
    assert method.measured() == dict(zip((f"max_norm/{tag}" for tag in TAGS), (2, 0.25, 0.5), strict=True))


def _broken(*_):
    raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        ("update_grad_norms", _broken, "--network_module: update_grad_norms of networks.lora fails: no such thing"),
        ("apply_max_norm_regularization", _broken, "apply_max_norm_regularization of networks.lora fails: no such"),
        ("apply_max_norm_regularization", lambda *_: (1, 2), "--scale_weight_norms: networks of networks.lora do not"),
    ],
)
def test_what_fails_in_networks_of_others_shows_in_the_rehearsal(
    name, answer, sentence, train, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(LoRANetwork, name, answer, raising=False)
    monkeypatch.setattr(companions, "watch", None)  # so that no step can follow
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, scale_weight_norms=1, no_rehearsal=None))
    assert sentence in capsys.readouterr().err


def test_a_rehearsed_norm_leaves_no_trace(train, flags, tmp_path):
    changes = {"scale_weight_norms": 0.05, "max_train_steps": 2}
    train(flags(tmp_path / "plain", **changes))
    train(flags(tmp_path / "rehearsed", **changes, no_rehearsal=None))
    assert stored(tmp_path / "rehearsed" / "run.safetensors") == stored(tmp_path / "plain" / "run.safetensors")


def test_averages_that_would_not_be_scaled_are_refused(train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ModelInfo, "load", None)  # so that nothing can be loaded
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, scale_weight_norms=1, optimizer_type="AdamWScheduleFree"))
    assert "--scale_weight_norms scales the weights that steps are taken from" in capsys.readouterr().err


def test_networks_that_look_at_all_gradients_refuse_that_they_are_freed(train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LoRANetwork, "update_grad_norms", lambda self: None, raising=False)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, fused_optimizer_groups=2))
    assert "--fused_optimizer_groups: this network looks at all gradients" in capsys.readouterr().err


def test_networks_that_cannot_do_it_are_refused(train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(LoRANetwork, "apply_max_norm_regularization")
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, scale_weight_norms=1))
    assert "--scale_weight_norms: networks of networks.lora cannot be scaled down, leave it out" in (
        capsys.readouterr().err
    )
