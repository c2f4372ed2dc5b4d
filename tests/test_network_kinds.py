"""Kinds of networks in files: each changes a weight as the package that has trained it does."""

import math
from pathlib import Path

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.lora.changes import Change
from library.lora.reading import open_network

NAME = "lora_unet_mid_block_attentions_0_proj_in"
LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "square": lambda: nn.Linear(24, 24),
    "1x1": lambda: nn.Conv2d(24, 40, 1),
    "3x3": lambda: nn.Conv2d(24, 40, 3, padding=1),
}
KINDS = {
    "LoRA": (LoConModule, {}),
    "LoRA, Tucker": (LoConModule, {"use_tucker": True}),
    "LoRA, by rank's root": (LoConModule, {"rs_lora": True}),
    "DoRA": (LoConModule, {"weight_decompose": True}),
    "DoRA on inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": (LohaModule, {}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoHa, decomposed": (LohaModule, {"weight_decompose": True}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr, unbalanced": (LokrModule, {"factor": 4, "unbalanced_factorization": True}),
    "LoKr, Tucker": (LokrModule, {"factor": 2, "use_tucker": True}),
    "LoKr, both sides": (LokrModule, {"lora_dim": 2, "decompose_both": True}),
    "LoKr, undivided": (LokrModule, {"full_matrix": True}),
    "LoKr, decomposed on inputs": (LokrModule, {"factor": 4, "weight_decompose": True, "wd_on_out": False}),
    "full": (FullModule, {}),
    "OFT": (DiagOFTModule, {"lora_dim": 8, "constraint": 0}),
    "OFT, limited": (DiagOFTModule, {"lora_dim": 8, "constraint": 1e-2, "rescaled": True}),
    "IA3": (IA3Module, {}),
    "IA3 on inputs": (IA3Module, {"train_on_input": True}),
}


def make(kind: type[nn.Module], layer: nn.Module, **settings: object) -> nn.Module:
    """A module of LyCORIS on a layer, with random weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        module = kind(NAME, layer, **{"lora_dim": 3, "alpha": 2.0, **settings})
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module.eval()


def save(path: Path, module: nn.Module, name: str = NAME) -> Path:
    save_file({f"{name}.{key}": x.detach().contiguous() for key, x in module.state_dict().items()}, path)
    return path


def read(path: Path, name: str = NAME) -> Change:
    with open_network(path) as network:
        assert list(network.layers) == [name]
        return network.change(name)


def answer(layer: nn.Module, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, bias, padding=layer.padding) if x.dim() == 4 else x @ weight.T + bias


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_weight_becomes_that_of_lycoris(tmp_path, kind, shape):
    layer = LAYERS[shape]()
    weight, bias = layer.weight.clone(), layer.bias.clone()
    algorithm, settings = KINDS[kind]
    module = make(algorithm, layer, **settings)
    module.apply_to()
    change = read(save(tmp_path / "x.safetensors", module))
    x = torch.randn(2, 24, 5, 5) if "x" in shape else torch.randn(7, 24)
    expected, plain = module(x), answer(layer, weight, bias, x)
    assert (expected - plain).abs().max() > 1e-2
    whole = change.applied(weight.clone(), 1.0)
    torch.testing.assert_close(
        answer(layer, whole, bias if change.bias is None else bias + change.bias, x), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(change.applied(weight.clone(), 0.5), (weight + whole) / 2)
    assert change.fits(weight.shape)
    assert not change.fits([size + 1 for size in weight.shape])
    if change.additive:
        torch.testing.assert_close(weight + change.delta().view(weight.shape), whole)
    if change.low_rank:
        up, down = change.factors()
        torch.testing.assert_close((up @ down).view(weight.shape), change.delta().view(weight.shape))


def test_what_depends_on_the_weight_has_no_difference_and_what_is_wide_no_factors(tmp_path):
    layer = LAYERS["linear"]()
    dora = read(save(tmp_path / "x.safetensors", make(LoConModule, layer, weight_decompose=True)))
    assert not dora.additive
    with pytest.raises(TypeError, match=r"DoRA .* depends on the weight"):
        dora.delta()
    narrow, wide = (
        read(save(tmp_path / f"{rank}.safetensors", make(LohaModule, layer, lora_dim=rank))) for rank in (4, 5)
    )
    assert narrow.low_rank
    assert narrow.factors().rank == 16
    assert not wide.low_rank
    with pytest.raises(TypeError, match="no product of two small matrices"):
        wide.factors()


def test_alpha_says_nothing_of_what_has_no_rank(tmp_path):
    module = make(LokrModule, LAYERS["linear"](), full_matrix=True)
    expected = read(save(tmp_path / "x.safetensors", module)).delta()
    module.alpha.fill_(0.5)
    assert torch.equal(read(save(tmp_path / "x.safetensors", module)).delta(), expected)
    torch.testing.assert_close(expected, torch.kron(module.lokr_w1, module.lokr_w2))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "full"])
def test_a_scalar_beside_the_matrices_scales_them(tmp_path, kind):
    """As older releases of LyCORIS wrote it."""
    algorithm, settings = KINDS[kind]
    save(tmp_path / "x.safetensors", make(algorithm, LAYERS["linear"](), **settings))
    expected = read(tmp_path / "x.safetensors").delta() * 0.25
    tensors = load_file(tmp_path / "x.safetensors") | {f"{NAME}.scalar": torch.tensor(0.25)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.testing.assert_close(read(tmp_path / "x.safetensors").delta(), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(4, 16)])
@torch.no_grad()
def test_norms(tmp_path, norm):
    change = read(save(tmp_path / "x.safetensors", module := make(NormModule, norm)))
    torch.testing.assert_close(change.applied(norm.weight.clone(), 0.5), norm.weight + module.w_norm / 2)
    torch.testing.assert_close(change.bias, module.b_norm)
    assert change.fits((16,))


@torch.no_grad()
def test_weights_turned_by_a_network_of_another_name(tmp_path):
    """OFT as networks of this kind spell it: blocks by their number, and the limit times the outputs."""
    layer = nn.Linear(6, 8)
    tensors = {"oft_blocks": torch.randn(2, 4, 4), "alpha": torch.tensor(0.01)}
    name = "unet_mid_block_attentions_0_proj_in"
    save_file({f"oft_{name}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "x.safetensors")
    skew = tensors["oft_blocks"] - tensors["oft_blocks"].mT
    skew = skew / skew.norm() * 0.08
    rotations = [(torch.eye(4) + block) @ (torch.eye(4) - block).inverse() for block in skew]
    expected = torch.block_diag(*(rotation.T for rotation in rotations)) @ layer.weight
    torch.testing.assert_close(read(tmp_path / "x.safetensors", f"lora_{name}").applied(layer.weight, 1.0), expected)


@pytest.mark.parametrize(
    ("algorithm", "settings", "kind"),
    [(ButterflyOFTModule, {"lora_dim": 8}, "as a BOFT"), (GLoRAModule, {}, "as a GLoRA")],
)
def test_kinds_that_are_not_known_are_named(tmp_path, algorithm, settings, kind):
    path = save(tmp_path / "x.safetensors", make(algorithm, LAYERS["square"](), **settings))
    with pytest.raises(UserError, match=rf"^.*x.safetensors changes {NAME} in a way that is not known here, {kind}: "):
        read(path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"lora_up.weight": torch.ones(40, 4)}, "matrices that do not go together, of ranks 4 and 3"),
        ({"lora_up.weight": torch.ones(40)}, "tensors whose shapes do not go together"),
        ({"lora_up.weight": None}, "by lora_down.weight"),
        ({"lora_side.weight": torch.ones(3)}, "by lora_down.weight, lora_side.weight"),
        ({"alpha": torch.tensor(math.inf)}, "by numbers that are not finite, in its alpha"),
        ({"scalar": torch.tensor(math.nan)}, "by numbers that are not finite, in its scalar"),
        ({"lora_up.weight": torch.full((40, 3), math.nan)}, "by numbers that are not finite, in its lora_up.weight"),
        ({"alpha": torch.ones(2)}, "with 2 numbers as its alpha and not one"),
        ({"lora_up.weight": torch.ones(40, 3, dtype=torch.int8)}, "since its lora_up.weight is stored as int8"),
        (
            {"lora_up.weight": torch.ones(40, 0), "lora_down.weight": torch.ones(0, 24)},
            "by nothing, since its lora_.*.weight is empty, as of rank 0",
        ),
    ],
)
def test_tensors_that_make_no_sense_together(tmp_path, damage, sentence):
    tensors = {"lora_up.weight": torch.ones(40, 3), "lora_down.weight": torch.ones(3, 24), "alpha": torch.tensor(1.0)}
    tensors = {f"{NAME}.{part}": x for part, x in (tensors | damage).items() if x is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x.safetensors changes {NAME} .*{sentence}"):
        read(tmp_path / "x.safetensors")


def test_factors_of_8_bits_and_whole_alphas_are_read(tmp_path):
    whole = {"lora_up.weight": torch.ones(40, 3), "lora_down.weight": torch.full((3, 24), 0.5)}
    small = {f"{NAME}.{part}": tensor.to(torch.float8_e4m3fn) for part, tensor in whole.items()}
    save_file(small | {f"{NAME}.alpha": torch.tensor(6)}, tmp_path / "x.safetensors")
    torch.testing.assert_close(read(tmp_path / "x.safetensors").delta(), torch.full((40, 24), 3.0))
