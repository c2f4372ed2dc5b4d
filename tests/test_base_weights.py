"""--base_weights: networks merged into the model before it is trained on."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.lora.names import named_modules
from library.models.family import Family
from library.models.registry import ModelInfo
from library.options import ModelOptions, NetworkOptions, Settings
from library.training.base_model import inspect_base_model
from library.training.base_weights import find_base_networks, merge_base_networks
from tests.test_foreign_network import MODULE
from tests.test_training import PROPORTIONAL, assert_equal_to_rounding
from tests.tiny import draw_pictures, largest_difference, make_model

LORA, LYCORIS = "networks.lora", "lycoris.kohya"
NETWORKS: dict[str, dict[str, object]] = {
    "lora": {"module": LORA},
    "locon": {"module": LYCORIS, "algo": "locon", "conv_dim": 2},
    "decomposed": {"module": LYCORIS, "algo": "loha", "dora_wd": "True"},
    "norms": {"module": LYCORIS, "algo": "lokr", "factor": 4, "train_norm": "True"},
    "whole": {"module": LYCORIS, "algo": "full"},
}


def parts(model: Family) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    points = model.attach_points()
    return points.text_encoder, points.unet


def attach(model: Family, module: str = LORA, seed: int = 1, **arguments: object) -> nn.Module:
    """A network of random weights, at work."""
    torch.manual_seed(seed)
    network = importlib.import_module(module).create_network(1.0, 2, 1.0, None, *parts(model), **arguments)
    network.apply_to(*parts(model), True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.network = network.eval()  # that it lives as long
    return network


def write(path: Path, family: str = "sd1", **arguments: object) -> Path:
    """Such a network's file."""
    attach(make_model(family), **arguments).save_weights(str(path), torch.float32, {})
    return path


def answer(model: Family) -> Tensor:
    """What it says to captions and noise."""
    with torch.no_grad():
        text = model.encode_text(["a red circle", "sks"])
        noisy = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        condition = model.condition(text, torch.full((2, 6), 32.0))
        return model.denoise(noisy, torch.tensor([100, 800]), condition)


@pytest.fixture(scope="module")
def info(tmp_path_factory) -> Callable[[str], ModelInfo]:
    """Of a tiny model whose weights have 16 bits in its file."""
    folder = tmp_path_factory.mktemp("models")

    def make(family: str = "sd1") -> ModelInfo:
        path = folder / f"{family}.safetensors"
        if not path.exists():
            make_model(family).save(path, torch.bfloat16)
        options = ModelOptions(pretrained_model_name_or_path=str(path))
        return inspect_base_model(Settings({ModelOptions: options}, frozenset()))

    return make


def merged(
    info: ModelInfo,
    *files: Path,
    dtype: torch.dtype = torch.float32,
    strengths: tuple[float, ...] | None = None,
    module: str = LORA,
) -> Family:
    """The model with these networks in it."""
    names = tuple(map(str, files))
    options = NetworkOptions(network_module=module, base_weights=names, base_weights_multiplier=strengths)
    networks = find_base_networks(Settings({NetworkOptions: options}, frozenset()), info)
    model = info.load(dtype)
    merge_base_networks(networks, model)
    return model


@pytest.mark.parametrize(("family", "name"), [("sd1", name) for name in NETWORKS] + [("sdxl", "decomposed")])
def test_a_model_says_with_a_network_in_it_what_it_says_with_it_beside(info, tmp_path, family, name):
    beside, file = info(family).load(), tmp_path / "network.safetensors"
    attach(beside, **NETWORKS[name]).save_weights(str(file), torch.float32, {})
    plain, expected = answer(info(family).load()), answer(beside)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(answer(merged(info(family), file)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "decomposed"])
def test_half_as_strong_is_half_way(info, tmp_path, name):
    file = write(tmp_path / "network.safetensors", **NETWORKS[name])
    none, half, all_of_it = (merged(info(), file, strengths=(strength,)).tensors() for strength in (0, 0.5, 1))
    start = info().load().tensors()
    for key, tensor in start.items():
        assert torch.equal(none[key], tensor)
        torch.testing.assert_close(half[key], (tensor + all_of_it[key]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("locon", "lora")])
def test_several_are_summed_up_before_anything_is_rounded(info, tmp_path, kinds):
    files = [write(tmp_path / f"{seed}.safetensors", seed=seed, **NETWORKS[kind]) for seed, kind in enumerate(kinds, 1)]
    exact, rounded = (
        merged(info(), *files, strengths=(0.5,), dtype=dtype).tensors() for dtype in (torch.float32, torch.bfloat16)
    )
    untouched, changed = info().load().tensors(), 0
    for name, tensor in rounded.items():
        assert torch.equal(exact[name].to(tensor.dtype), tensor), name
        changed += not torch.equal(untouched[name], exact[name])
    assert changed > 30


def test_strengths_belong_to_files_in_their_order_and_the_rest_is_whole():
    options = NetworkOptions(base_weights=("a", "b", "c"), base_weights_multiplier=(0.5, -1))
    assert options.base_networks == [(Path("a"), 0.5), (Path("b"), -1), (Path("c"), 1)]
    with pytest.raises(UserError, match=r"^--base_weights_multiplier: 2 values are given for 1 --base_weights"):
        NetworkOptions(base_weights=("a",), base_weights_multiplier=(1, 1))


def test_what_fits_in_part_is_merged_and_the_rest_named(info, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("library.training.base_weights.console.warn", said.append)
    weights = load_file(write(tmp_path / "a.safetensors"))
    other = {key.replace("lora_unet_mid_block", "lora_unet_middle"): tensor for key, tensor in weights.items()}
    save_file(other, tmp_path / "b.safetensors")
    merged(info(), tmp_path / "b.safetensors")
    (sentence,) = said
    counts = re.search(r"b.safetensors has (\d+) modules, of which (\d+) have a layer in the model", sentence)
    assert 0 < int(counts[2]) < int(counts[1]) == len(weights) // 3


def test_the_package_that_trained_a_network_is_not_needed(info, tmp_path, monkeypatch):
    file = write(tmp_path / "a.safetensors", module=LYCORIS, algo="loha", dora_wd="True", train_norm="True")
    monkeypatch.setattr("library.training.base_weights.import_network_module", None)
    assert not torch.equal(answer(merged(info(), file)), answer(info().load()))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_kinds_that_only_lycoris_knows_are_merged_by_it_among_others(info, tmp_path, strength):
    """Whose own layers are ours, in which it would multiply with alpha / rank twice."""
    weights = {}
    for start, algorithm in (("lora_te", "loha"), ("lora_unet", "glora")):
        made = load_file(write(tmp_path / "made.safetensors", module=LYCORIS, algo=algorithm))
        weights[start] = {key: tensor for key, tensor in made.items() if key.startswith(start)}
        save_file(weights[start], tmp_path / f"{start}.safetensors")
    save_file(weights["lora_te"] | weights["lora_unet"], tmp_path / "both.safetensors")
    both, text, unet = (
        merged(info(), tmp_path / f"{name}.safetensors", strengths=(strength,)).tensors()
        for name in ("both", "lora_te", "lora_unet")
    )
    for name, plain in info().load().tensors().items():
        one = text if not torch.equal(text[name], plain) else unet
        assert torch.equal(both[name], one[name]), name
    assert sum(not torch.equal(unet[name], text[name]) for name in both) > 30


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_networks_in_the_names_of_diffusers(info, tmp_path, family):
    """With the same weights as one in our own names."""
    file = write(tmp_path / "own.safetensors", family)
    model = make_model(family)
    layers = {id(layer): name for name, layer in named_modules(model.attach_points()).items()}
    paths = {
        layers[id(layer)]: f"{root}.{path}"
        for root, (part, _) in model.components().items()
        for path, layer in part.named_modules()
        if id(layer) in layers
    }
    renamed = {}
    for key, tensor in load_file(file).items():
        name, _, part = key.partition(".")
        end = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(part, part)
        renamed[f"{paths[name]}.{end}"] = tensor
    assert not any(key.startswith("lora_") for key in renamed)
    save_file(renamed, tmp_path / "other.safetensors")
    own, other = (merged(info(family), tmp_path / f"{name}.safetensors").tensors() for name in ("own", "other"))
    assert all(torch.equal(other[name], tensor) for name, tensor in own.items())
    assert any(not torch.equal(tensor, own[name]) for name, tensor in info(family).load().tensors().items())


# whole runs


@pytest.fixture
def run(train, flags, tmp_path):
    """`run(name, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, **changes: object) -> Path:
        train(flags(tmp_path / name, **changes))
        return tmp_path / name / "run.safetensors"

    return start


def test_a_run_is_that_upon_the_merged_model_and_saves_the_new_network_alone(run, tmp_path, model_file, capsys):
    (tmp_path / "secret").mkdir()
    base = write(tmp_path / "secret" / "base.safetensors")
    whole = make_model()
    importlib.import_module(LORA).LoRANetwork((), 0.5).merge_to(*parts(whole), load_file(base))
    whole.save(tmp_path / "whole.safetensors")
    changes = {"save_precision": "float", **PROPORTIONAL}
    upon = run("upon", base_weights=base, base_weights_multiplier=0.5, **changes)
    assert "merged into the model: base.safetensors, at strength 0.5" in capsys.readouterr().err
    assert_equal_to_rounding(upon, run("same", pretrained_model_name_or_path=tmp_path / "whole.safetensors", **changes))
    assert largest_difference(upon, run("plain", **changes)) > 1e-4
    with safe_open(upon, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["ss_base_weights"]) == [["base.safetensors", 0.5]]
    assert "secret" not in str(metadata)


def test_cached_text_knows_what_was_merged(run, tmp_path):
    """Of a network that changes the text encoder; one that does not leaves the files as they are."""
    base = write(tmp_path / "base.safetensors")
    unet_only = {key: tensor for key, tensor in load_file(base).items() if key.startswith("lora_unet")}
    save_file(unet_only, tmp_path / "unet.safetensors")
    draw_pictures(tmp_path / "data" / "1_x", 2)
    common = {"train_data_dir": tmp_path / "data", "network_train_unet_only": True, "max_train_steps": 1}
    common |= {"cache_text_encoder_outputs_to_disk": True}
    seen = []
    for name, files in (
        ("plain", None),
        ("unet", "unet.safetensors"),
        ("base", "base.safetensors"),
        ("again", "base.safetensors"),
    ):
        run(name, base_weights=files and tmp_path / files, **common)
        seen.append({path.name: path.read_bytes() for path in (tmp_path / "data").rglob("*.npz")})
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert len(seen[0]) == 2


def test_a_resumed_run_says_where_they_are_others(run, tmp_path, capsys):
    base = write(tmp_path / "base.safetensors")
    run("begun", base_weights=base, max_train_steps=2, save_state_on_train_end=True)
    sentence = "the base weights are others, which what was learned upon the old ones may not fit"
    base.rename(tmp_path / "moved.safetensors")
    for name, changes, said in (
        ("moved", {"base_weights": tmp_path / "moved.safetensors"}, False),
        ("weaker", {"base_weights": tmp_path / "moved.safetensors", "base_weights_multiplier": 0.5}, True),
        ("without", {}, True),
    ):
        capsys.readouterr()
        run(name, resume=tmp_path / "begun" / "run-state", max_train_steps=3, **changes)
        assert (sentence in capsys.readouterr().err) is said, name


def test_a_dry_run_merges_nothing_and_finds_what_is_wrong(train, flags, tmp_path, capsys):
    good, bad = write(tmp_path / "good.safetensors"), write(tmp_path / "bad.safetensors", "sdxl")
    train(flags(tmp_path / "out", base_weights=good, dry_run=True))
    assert "merged" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", base_weights=(good, bad), dry_run=True))
    assert "bad.safetensors is for another kind of model than this" in capsys.readouterr().err


@pytest.mark.slow
def test_previews_show_what_is_merged(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    base = write(tmp_path / "base.safetensors", seed=3)
    pictures = []
    for name, files in (("with", base), ("without", None)):
        run(name, base_weights=files, sample_prompts=tmp_path / "prompts.txt", sample_at_first=True, max_train_steps=1)
        pictures += [path.read_bytes() for path in (tmp_path / name / "sample").glob("*.png")]
    assert len(pictures) == 2
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "goof.safetensors", r"goof.safetensors is no file, did you mean .*good.safetensors\?"),
        (lambda folder: folder, "is no file"),
        (
            lambda folder: make_model().save(folder / "model.safetensors") or folder / "model.safetensors",
            "no network's file",
        ),
        (
            lambda folder: write(folder / "x.safetensors", "sdxl", **NETWORKS["decomposed"]),
            "is for another kind of model than this",
        ),
        (lambda folder: write(folder / "2.safetensors", "sd2"), "is for another kind of model than this"),
    ],
)
def test_mistakes_are_one_sentence(train, flags, tmp_path, capsys, make, sentence):
    write(tmp_path / "good.safetensors")
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", base_weights=make(tmp_path)))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert re.search(rf"^error: --base_weights: .*{sentence}", line)


def test_files_of_a_users_own_module_are_read_by_it(info, tmp_path, monkeypatch):
    own = MODULE + (
        "\n\ndef create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None, "
        "for_inference=False, **others):\n"
        "    network = create_network(multiplier, 1, 1, vae, text_encoder, unet)\n"
        "    network.merge_to = lambda te, unet, weights, dtype, device: [\n"
        "        layer.weight.data.mul_(weights[name].item()) for name, layer in network.layers.items()\n"
        "    ]\n"
        "    return network, weights_sd\n"
    )
    (tmp_path / "factors_to_merge.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write(tmp_path / "own.safetensors", module="factors_to_merge")
    weights = load_file(file)
    model = merged(info(), file, module="factors_to_merge", strengths=(0.5,))
    name = "unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    before, after = (
        one.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight for one in (info().load(), model)
    )
    torch.testing.assert_close(after, before * (1 + weights[name]) / 2)
