"""networks/resize_lora.py against full decompositions in float64, and what it refuses."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import cli
from library.lora.changes import Factors
from library.lora.reading import open_network
from library.lora.resizing import Choice, chosen_rank, svd_of_kronecker
from library.models.files.checkpoint import hash_file
from networks import resize_lora

LINEAR = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SMALL = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_mid_block_resnets_0_conv1"
KEYS = Path(__file__).parent / "data" / "lora_keys" / "sd1_conv.tsv.gz"
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}

Tensors = Mapping[str, Tensor]


def lora(rank: int = 8, true_rank: int | None = None, alpha: float = 3.0, seed: int = 0) -> dict[str, Tensor]:
    """One layer of each shape, with singular values that fall; only the first `true_rank` are not 0."""
    generator = torch.Generator().manual_seed(seed)
    falling = torch.where(torch.arange(rank) < (true_rank or rank), 0.7 ** torch.arange(rank), 0.0)
    tensors = {}
    for name, (out, *inputs) in {LINEAR: (20, 16), SMALL: (12, 14, 1, 1), CONV: (10, 6, 3, 3)}.items():
        ones = (1,) * (len(inputs) - 1)
        up = torch.randn(out, rank, generator=generator) * falling
        tensors[f"{name}.lora_up.weight"] = (up @ torch.randn(rank, rank, generator=generator)).view(out, rank, *ones)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *inputs, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def products(tensors: Tensors) -> dict[str, Tensor]:
    """What a LoRA adds to each layer, as a matrix in float64."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.alpha"].item()
            found[name] = alpha / len(down) * up.flatten(1) @ down.double().flatten(1)
    return found


def approximation(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def assert_near(ours: Tensor, expected: Tensor, share: float) -> None:
    assert (ours - expected).norm() <= share * expected.norm()


Resize = Callable[..., Path]


@pytest.fixture
def resize(tmp_path, monkeypatch, fresh_console) -> Resize:
    """`resize(tensors, **flags)`: the file that is made of these, or of the file of this path."""

    def run(tensors: Tensors | Path, metadata: Mapping[str, str] | None = None, **flags: object) -> Path:
        source = tensors if isinstance(tensors, Path) else tmp_path / "source.safetensors"
        if not isinstance(tensors, Path):
            save_file(dict(tensors), source, dict(metadata or {}))
        values = {"model": source, "save_to": tmp_path / "small.safetensors", **flags}
        words = [
            word
            for name, value in values.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
        ]
        monkeypatch.setattr(sys, "argv", ["resize_lora.py", *words])
        cli.run(resize_lora.main)
        return Path(values["save_to"])

    return run


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("precision", ["float", "fp16", "bf16"])
def test_each_layer_is_the_best_approximation_of_its_rank(resize, precision):
    small = load_file(resize(lora(), new_rank=3, new_conv_rank=2, save_precision=precision))
    ranks = {LINEAR: 3, SMALL: 3, CONV: 2}  # a 1x1 convolution counts as linear
    rounding = EPSILON[small[f"{LINEAR}.lora_up.weight"].dtype]
    for name, product in products(lora()).items():
        assert len(small[f"{name}.lora_down.weight"]) == ranks[name]
        assert_near(products(small)[name], approximation(product, ranks[name]), 4 * rounding)
        assert small[f"{name}.alpha"].item() == pytest.approx(3 / 8 * ranks[name])
    assert small[f"{CONV}.lora_down.weight"].shape == (2, 6, 3, 3)
    assert small[f"{CONV}.lora_up.weight"].shape == (10, 2, 1, 1)


def test_at_the_true_rank_nothing_is_lost_and_doing_it_again_changes_nothing(resize, tmp_path):
    original = lora(rank=8, true_rank=3)
    once = resize(original, new_rank=3)
    for name, product in products(original).items():
        assert_near(products(load_file(once))[name], product, 1e-6)
    twice = resize(once, new_rank=3, save_to=tmp_path / "twice.safetensors")
    for name, product in products(load_file(once)).items():
        assert torch.equal(products(load_file(twice))[name], product)


def test_a_larger_rank_leaves_a_network_as_it_is(resize):
    for name, tensor in load_file(resize(lora(), new_rank=32)).items():
        assert torch.equal(tensor, lora()[name])


def test_tiny_alphas_and_weights_survive_half_precision(resize):
    original = {key: tensor * (1e-7 if key.endswith("alpha") else 30) for key, tensor in lora().items()}
    small = load_file(resize(original, new_rank=8, dynamic_method="sv_fro", dynamic_param=1, save_precision="fp16"))
    for name, product in products(original).items():
        assert_near(products(small)[name], product, 4 * EPSILON[torch.float16])


@pytest.mark.parametrize(
    ("method", "param"),
    [("sv_ratio", 1), ("sv_ratio", 3.5), ("sv_cumulative", 0.6), ("sv_fro", 0.9), ("sv_fro", 1), ("sv_cumulative", 0)],
)
def test_dynamic_methods_choose_by_definition(resize, method, param):
    small = load_file(resize(lora(rank=6), new_rank=5, dynamic_method=method, dynamic_param=param))
    for name, product in products(lora(rank=6)).items():
        s = torch.linalg.svdvals(product)[:6]
        ranks = range(1, 7)
        if method == "sv_ratio":
            rank = max(rank for rank in ranks if s[0] / s[rank - 1] <= param)
        elif method == "sv_cumulative":
            rank = min(rank for rank in ranks if s[:rank].sum() >= param * s.sum() - 1e-9)
        else:
            rank = min(rank for rank in ranks if s[:rank].norm() >= param * s.norm() - 1e-9)
        assert len(small[f"{name}.lora_down.weight"]) == min(rank, 5)
        assert_near(products(small)[name], approximation(product, min(rank, 5)), 1e-5)


def test_a_layer_of_zeros_gets_rank_1():
    for method in (None, "sv_ratio", "sv_cumulative", "sv_fro"):
        assert chosen_rank(torch.zeros(4), Choice(4, 4, method, 1.0), 4) == 1


def test_values_that_are_not_known_count_in_the_norm():
    choice = Choice(9, 9, "sv_fro", 0.9)
    whole = torch.tensor([4.0, 3.0, 2.0, 2.0, 1.0])
    assert chosen_rank(whole, choice, 9) == 3
    assert chosen_rank(whole[:4], choice, 9, rest=1.0) == 3
    assert chosen_rank(whole[:3], choice, 9, rest=500.0) == 3


def test_same_bytes_whatever_the_number_of_threads(resize, tmp_path):
    files = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        files.append(resize(lora(seed=2), new_rank=3, save_to=tmp_path / f"{threads}.safetensors"))
        torch.set_num_threads(before)
    first, second = (load_file(file) for file in files)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_metadata_and_what_is_said(resize, capsys):
    known = {"ss_training_comment": "my cat", "ss_steps": "7", "sshs_model_hash": "old", "ss_network_dim": "8"}
    path = resize(lora(), known, new_rank=3, new_conv_rank=2, verbose=True)
    said = metadata_of(path)
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_steps"]) == ("3", "1.125", "7")
    assert said["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "0.75"}'
    assert said["ss_training_comment"] == "my cat; resized to rank 3"
    assert len(said["sshs_model_hash"]) == 64
    source = path.with_name("source.safetensors")
    told = {"sources": [{"name": source.name, "sha256": hash_file(source).sha256}], "rank": 3, "conv_rank": 2}
    made_by = json.loads(said["ss_made_by"])
    assert made_by == {"tool": "networks/resize_lora.py", **told, "method": None, "param": None}
    captured = capsys.readouterr()
    product = torch.linalg.svdvals(products(lora())[LINEAR])
    kept = product[:3].norm() / product.norm()
    assert f"{LINEAR}: rank 8 -> 3, alpha 1.125, kept " in captured.out
    assert f"{kept:.1%} of the Frobenius norm" in captured.out
    assert "3 layers of rank 2 to 3, which keep " in captured.err
    dynamic = metadata_of(resize(lora(), known, new_rank=7, dynamic_method="sv_ratio", dynamic_param=3))
    assert dynamic["ss_training_comment"] == "my cat; resized to rank sv_ratio 3, at most 7"


def test_nothing_is_lost_of_what_does_nothing(resize, capsys):
    resize(lora(alpha=0), new_rank=2)
    assert "keep 100.0% (standard deviation 0.0%)" in capsys.readouterr().err


def test_magnitudes_norms_and_biases_stay(resize):
    kept = {
        f"{LINEAR}.dora_scale": torch.rand(20, 1),
        f"{CONV}.diff_b": torch.rand(10),
        "lora_unet_mid_block_resnets_0_norm1.w_norm": torch.rand(6),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": torch.rand(6),
    }
    small = load_file(resize(lora() | kept, new_rank=2))
    assert all(torch.equal(small[key], tensor) for key, tensor in kept.items())
    assert_near(products(small)[LINEAR], approximation(products(lora())[LINEAR], 2), 1e-6)


def full_delta(path: Path, name: str) -> Tensor:
    with open_network(path) as network:
        return network.change(name).delta().flatten(1).double()


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_factors", "diff"])
@pytest.mark.parametrize("method", [None, "sv_fro", "sv_cumulative"])
def test_other_kinds_become_loras(resize, tmp_path, kind, method):
    shapes = {  # of a 3x3 convolution (40, 6, 3, 3)
        "loha": {"hada_w1_a": (40, 2), "hada_w1_b": (2, 54), "hada_w2_a": (40, 2), "hada_w2_b": (2, 54)},
        "lokr": {"lokr_w1": (4, 2), "lokr_w2": (10, 3, 3, 3)},
        "lokr_factors": {"lokr_w1": (4, 2), "lokr_w2_a": (10, 3), "lokr_w2_b": (3, 27)},
        "diff": {"diff": (40, 6, 3, 3)},
    }[kind]
    torch.manual_seed(0)
    tensors = {f"{CONV}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    if kind != "diff":
        tensors[f"{CONV}.alpha"] = torch.tensor(1.5)
    flags = {"dynamic_method": method, "dynamic_param": 0.5} if method else {}
    small = load_file(resize(tensors, new_rank=3, **flags))
    product = full_delta(tmp_path / "source.safetensors", CONV)
    s = torch.linalg.svdvals(product)
    if method is None:
        rank = 3
    else:
        power = {"sv_fro": 2, "sv_cumulative": 1}[method]
        rank = min(rank for rank in range(1, 41) if s[:rank].pow(power).sum() >= 0.5**power * s.pow(power).sum())
    assert small[f"{CONV}.lora_down.weight"].shape == (min(rank, 3), 6, 3, 3)
    assert_near(products(small)[CONV], approximation(product, min(rank, 3)), 1e-4)


def test_kronecker_products_are_decomposed_from_their_sides():
    torch.manual_seed(0)
    one, other = (Factors(torch.randn(m, 3).double(), torch.randn(3, n).double()) for m, n in ((5, 4), (6, 7)))
    product = -2.5 * torch.kron(one.up @ one.down, other.up @ other.down)
    svd = svd_of_kronecker(one, other, -2.5, limit=4)
    assert torch.allclose(svd.s, torch.linalg.svdvals(product)[:9])
    assert_near(svd.truncated(4).up @ svd.truncated(4).down, approximation(product, 4), 1e-12)


def refused(resize: Resize, capsys, *arguments: object, **flags: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        resize(*arguments, **flags)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"new_rank": 0}, "--new_rank: 0 is too small, use 1 or more"),
        ({"dynamic_method": "sv_fro"}, "add --dynamic_param"),
        ({"dynamic_param": 0.5}, "add that or drop it"),
        ({"dynamic_method": "sv_ratio", "dynamic_param": 0.5}, "use 1 or more for --dynamic_method sv_ratio"),
        ({"dynamic_method": "sv_fro", "dynamic_param": 1.5}, "use 0 to 1 for --dynamic_method sv_fro"),
        ({"dynamic_method": "sv_cumulative", "dynamic_param": -0.1}, "use 0 to 1"),
        ({"device": "nowhere"}, "--device: nowhere cannot be used"),
        ({"save_to": "small.txt"}, "--save_to: small.txt ends in none of"),
    ],
)
def test_flags_that_make_no_sense(resize, capsys, flags, message):
    assert message in refused(resize, capsys, lora(), **flags)


def test_files_that_cannot_be_resized(resize, capsys, tmp_path):
    source = tmp_path / "source.safetensors"
    save_file(lora(), source)
    assert "is one of the files to read" in refused(resize, capsys, source, save_to=source)
    assert f"did you mean {source}?" in refused(resize, capsys, tmp_path / "sorce.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(source.read_bytes()[:-40])
    assert "cut.safetensors" in refused(resize, capsys, cut)
    save_file({"emb_params": torch.rand(2, 4)}, cut)
    assert "is no network's file" in refused(resize, capsys, cut)
    norms = {"lora_unet_mid_block_resnets_0_norm1.w_norm": torch.rand(6)}
    assert "it changes no weights, only biases and norms" in refused(resize, capsys, norms)
    rotations = {f"{LINEAR}.oft_blocks": torch.rand(4, 5, 5), f"{LINEAR}.alpha": torch.tensor(1.0)}
    assert f"OFT, by which it changes {LINEAR}, has no rank" in refused(resize, capsys, rotations)
    broken = lora()
    broken[f"{SMALL}.lora_up.weight"][3, 1] = torch.nan
    assert f"changes {SMALL} by numbers that are not finite" in refused(resize, capsys, broken)
    assert not (tmp_path / "small.safetensors").exists()
