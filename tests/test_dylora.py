"""networks.dylora, and networks/extract_lora_from_dylora.py: every rank is what it was while it was trained."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library import cli
from library.models.files.checkpoint import hash_file
from networks import dylora, extract_lora_from_dylora, lora
from tests.lora_models import Transformer2DModel, randomise
from tests.test_network_weights import write_lora
from tests.tiny import make_model, stored

SMALL = {"network_module": "networks.dylora", "network_dim": 4, "network_alpha": 2, "network_args": "unit=2"}


def model_and_network(**arguments: object) -> tuple[nn.Module, dylora.DyLoRANetwork]:
    torch.manual_seed(5)
    unet = nn.ModuleDict({"mid": Transformer2DModel()})
    network = dylora.create_network(1.0, 6, 3.0, None, None, unet, unit=2, **arguments)
    network.apply_to(None, unet)
    return unet, randomise(network)


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """`tool(**flags)`: the script in this process."""

    def run(**flags: object) -> None:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["extract_lora_from_dylora.py", *words])
        cli.run(extract_lora_from_dylora.main)

    return run


@pytest.fixture
def refused(tool, capsys):
    def run(**flags: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            tool(**flags)
        (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return sentence

    return run


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_rank_that_is_extracted_computes_what_was_trained(tool, tmp_path, kind):
    """Bit for bit but for the order of sums, at each of the ranks; and what it writes is a plain LoRA."""
    model, network = model_and_network(**({"conv_dim": 6, "conv_alpha": 2} if kind == "convolution" else {}))
    network.save_weights(tmp_path / "whole.safetensors")
    tool(model=tmp_path / "whole.safetensors", save_to=tmp_path / "split.safetensors", unit=2)
    layer = model.mid.to_q if kind == "linear" else model.mid.proj_in
    x = torch.randn(3, 8) if kind == "linear" else torch.randn(3, 6, 4, 4)
    network.train()
    found = set()
    for _ in range(40):
        network.on_step_start()
        used = {module.used for module in network.children()}
        assert len(used) == 1
        found |= used
        (rank,) = used
        file = tmp_path / f"split-{rank:04d}.safetensors"
        plain_model = nn.ModuleDict({"mid": Transformer2DModel()})
        plain_model.load_state_dict(model.state_dict())
        plain, weights = lora.create_network_from_weights(1.0, file, None, None, plain_model)
        plain.apply_to(None, plain_model)
        plain.load_state_dict(weights)
        assert all(module.lora_dim == rank for module in plain.children())
        own = plain_model.mid.to_q if kind == "linear" else plain_model.mid.proj_in
        torch.testing.assert_close(own(x), layer(x), rtol=1e-5, atol=1e-6)
    assert found == {2, 4, 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "split-0002.safetensors",
        "split-0004.safetensors",
        "split-0006.safetensors",
        "whole.safetensors",
    ]


def test_gradients_reach_the_last_ranks_that_a_step_uses():
    model, network = model_and_network(conv_dim=6)
    network.train()
    for module in network.children():
        module.used = 4
    (model.mid.to_q(torch.randn(3, 8)).sum() + model.mid.conv(torch.randn(2, 6, 4, 4)).sum()).backward()
    for name in ("lora_unet_mid_to_q", "lora_unet_mid_conv"):
        module = getattr(network, name)
        moved = [rank for rank in range(6) if module.lora_down.weight.grad[rank].abs().sum() > 0]
        assert moved == [2, 3]
        assert [rank for rank in range(6) if module.lora_up.weight.grad[:, rank].abs().sum() > 0] == [2, 3]


def test_beside_training_all_ranks_are_used():
    model, network = model_and_network()
    x = torch.randn(3, 8)
    network.eval()
    whole = model.mid.to_q(x)
    module = network.lora_unet_mid_to_q
    module.used = 2
    assert torch.equal(model.mid.to_q(x), whole)
    base = nn.functional.linear(x, model.mid.to_q.weight, model.mid.to_q.bias)
    product = module.lora_up.weight @ module.lora_down.weight
    torch.testing.assert_close(whole, base + 0.5 * x @ product.t())


def test_arguments_that_contradict_nested_ranks_are_refused():
    unet = nn.ModuleDict({"mid": Transformer2DModel()})
    for arguments, why in (
        ({"unit": "4"}, "rank 6 is no multiple of unit 4"),
        ({"unit": "0"}, "unit must be a whole number from 1 to 65536, not '0'"),
        ({"unit": "two"}, "unit must be a whole number"),
        ({"conv_dim": "4"}, "conv_dim 4: DyLoRA has one rank for all layers, give 6"),
        ({"rank_dropout": "0.1"}, "rank_dropout: DyLoRA chooses itself"),
        ({"block_dims": ",".join(["6"] * 25)}, "one rank for all blocks"),
        ({"dora_wd": "True"}, "dora_wd"),
    ):
        with pytest.raises(ValueError, match=why):
            dylora.create_network(1.0, 6, 1.0, None, None, unet, **arguments)
    weights = {"lora_unet_mid_to_q": 2, "lora_unet_mid_proj_in": 4}
    tensors = {}
    for name, rank in weights.items():
        down, up = ((rank, 8), (10, rank)) if name.endswith("q") else ((rank, 6, 1, 1), (8, rank, 1, 1))
        tensors |= {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}
    with pytest.raises(ValueError, match="one rank for all layers, and the file has 2, 4"):
        dylora.create_network_from_weights(1.0, None, None, None, unet, tensors)


@pytest.mark.parametrize("module", ["lora", "lora_fa", "dylora"])
def test_files_of_normalisations_that_cannot_be_gone_on_with(train, flags, tmp_path, capsys, module):
    points = make_model().attach_points()
    made = lora.create_network(1.0, 4, 2.0, None, points.text_encoder, points.unet, train_norm=True)
    norms = {key: tensor for key, tensor in made.state_dict().items() if key.endswith("_norm")}
    save_file(norms, tmp_path / "norms.safetensors")
    made.save_weights(tmp_path / "both.safetensors")
    words = {"network_module": f"networks.{module}", "dim_from_weights": True, "scale_weight_norms": 1}
    sentence = "these weights train normalisations (w_norm), too, which this kind of network does not"
    for file in ("norms", "both") if module == "dylora" else ("norms",):
        with pytest.raises(SystemExit, match="2"):
            train(flags(tmp_path / "out", **words, network_weights=tmp_path / f"{file}.safetensors"))
        said = capsys.readouterr().err
        wanted = sentence if module == "dylora" else "these weights have normalisations alone"
        assert f"makes no network of {tmp_path / file}.safetensors: {wanted}" in said


def test_a_unit_that_does_not_divide_the_rank_of_a_file_is_refused(train, flags, tmp_path, capsys):
    file = write_lora(tmp_path / "lora.safetensors", "sd1", rank=4)
    words = {"network_module": "networks.dylora", "network_args": "unit=3", "dim_from_weights": True}
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **words, network_weights=file))
    sentence = (
        f"networks.dylora makes no network of {file}: rank 4 of these weights is no multiple of unit 3: give another"
    )
    assert f"error: --dim_from_weights: {sentence} unit\n" in capsys.readouterr().err


def test_factors_that_get_no_gradient_yet_are_no_mistake(train, flags, tmp_path):
    """LoRA+ makes a group of down alone, whose ranks are still 0 in up when they are drawn for the first time."""
    words = {"network_module": "networks.dylora", "network_dim": 16, "network_args": ("unit=1", "loraplus_lr_ratio=2")}
    train(flags(tmp_path, **words, max_train_steps=3, network_train_unet_only=True))


@pytest.mark.parametrize(
    "words",
    [
        '--network_dim=16 --network_args "unit=4"',
        '--network_dim=32 --network_alpha=16 --network_args "unit=4"',
        '--network_dim=16 --network_args "conv_dim=16" "unit=4"',
        '--network_dim=32 --network_alpha=16 --network_args "conv_dim=32" "conv_alpha=16" "unit=8"',
    ],
)
def test_command_lines_of_the_guide(train, flags, tmp_path, words):
    more = [word.strip('"') for word in words.split()]
    changes = {"network_module": "networks.dylora", "max_train_steps": 1}
    train([*flags(tmp_path, **changes), *more])
    file = tmp_path / "run.safetensors"
    ranks = {len(tensor) for name, tensor in load_file(file).items() if name.endswith("lora_down.weight")}
    assert ranks == {int(more[0].partition("=")[2])}
    assert any("resnets" in name for name in load_file(file)) == ("conv_dim" in words)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.dylora"
    assert "unit" in json.loads(metadata["ss_network_args"])


def test_a_run_that_is_killed_goes_on_as_if_it_was_not(train, flags, tmp_path):
    """With all that might be in the way of the ranks that are drawn."""
    words = SMALL | {"gradient_checkpointing": True, "ema": True, "scale_weight_norms": 0.5, "network_dropout": 0.1}
    words |= {"save_state": True, "save_every_n_steps": 2, "max_train_steps": 4}
    train(flags(tmp_path / "whole", **words))
    train(flags(tmp_path / "broken", **words, resume=tmp_path / "whole" / "run-step00000002-state"))
    for name in ("run.safetensors", "run-ema.safetensors"):
        assert stored(tmp_path / "broken" / name) == stored(tmp_path / "whole" / name)


def test_a_run_goes_on_with_a_file_and_with_an_extracted_rank(train, flags, tmp_path, tool):
    train(flags(tmp_path, **SMALL, max_train_steps=2))
    file = tmp_path / "run.safetensors"
    tool(model=file, save_to=tmp_path / "rank.safetensors", unit=2)
    still = {"learning_rate": 1e-12, "max_train_steps": 1}
    train(flags(tmp_path / "on", **SMALL | still, network_weights=file))
    for name, tensor in load_file(file).items():
        torch.testing.assert_close(load_file(tmp_path / "on" / "run.safetensors")[name], tensor, rtol=0, atol=1e-6)
    small = {"network_module": "networks.lora", "network_dim": None, "network_args": None, "dim_from_weights": True}
    rank = tmp_path / "rank-0002.safetensors"
    train(flags(tmp_path / "small", **SMALL | still | small, network_weights=rank))
    for name, tensor in load_file(rank).items():
        torch.testing.assert_close(load_file(tmp_path / "small" / "run.safetensors")[name], tensor, rtol=0, atol=1e-6)
    with safe_open(rank, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("2", pytest.approx(math.sqrt(2), 1e-4))
    assert "ss_network_args" not in metadata
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["sshs_model_hash"]
    assert str(tmp_path) not in json.dumps(metadata)


@pytest.fixture
def dylora_file(tmp_path) -> Path:
    points = make_model().attach_points()
    network = dylora.create_network(1.0, 6, 2.0, None, points.text_encoder, points.unet)
    randomise(network).save_weights(tmp_path / "d.safetensors", torch.float16, {"ss_network_module": "networks.dylora"})
    return tmp_path / "d.safetensors"


def test_what_cannot_be_extracted_is_refused(refused, dylora_file, tmp_path):
    files = {"model": dylora_file, "save_to": tmp_path / "out.safetensors"}
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(dylora_file), silent)
    assert "does not say what unit it was trained with" in refused(**files | {"model": silent})
    silent.unlink()
    assert "--unit: 4 does not divide 6" in refused(**files, unit=4)
    assert "--model: no file to read is named" in refused(save_to=files["save_to"], unit=1)
    assert "--save_to: the files to write are not named" in refused(model=dylora_file, unit=1)
    assert "ends in none of" in refused(**files | {"save_to": tmp_path / "out"}, unit=1)
    tensors = load_file(dylora_file)
    name = next(iter(tensors)).partition(".")[0]
    one = tensors | {
        f"{name}.lora_down.weight": tensors[f"{name}.lora_down.weight"][:1].clone(),
        f"{name}.lora_up.weight": tensors[f"{name}.lora_up.weight"][:, :1].clone(),
    }
    save_file(one, tmp_path / "mixed.safetensors")
    assert "its layers have the ranks 1, 6 and not one" in refused(
        **files | {"model": tmp_path / "mixed.safetensors"}, unit=1
    )
    other = {f"{name}.{part}": torch.ones(4, 4) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    save_file(tensors | other, tmp_path / "other.safetensors")
    assert f"changes {name} in a way that is not known here, by hada_w1_a" in refused(
        **files | {"model": tmp_path / "other.safetensors"}, unit=1
    )
    same = dylora_file.rename(tmp_path / "out-0002.safetensors")
    before = same.read_bytes()
    assert "is one of the files to read" in refused(**files | {"model": same}, unit=1)
    assert same.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mixed.safetensors",
        "other.safetensors",
        "out-0002.safetensors",
    ]


def test_the_number_format_stays_and_other_ranks_than_trained_are_said(tool, dylora_file, tmp_path, capsys):
    tool(model=dylora_file, save_to=tmp_path / "out.safetensors", unit=3)
    written = load_file(tmp_path / "out-0003.safetensors")
    for name, tensor in load_file(dylora_file).items():
        if name.endswith("lora_down.weight"):
            assert written[name].dtype == tensor.dtype == torch.float16
            assert torch.equal(written[name], tensor[:3])
        elif name.endswith("lora_up.weight"):
            assert torch.equal(written[name], tensor[:, :3])
    said = capsys.readouterr()
    assert said.out.count(" written\n") == 2
    assert "warning" not in said.err
    fours = {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}'}
    save_file(load_file(dylora_file), tmp_path / "fours.safetensors", fours)
    tool(model=tmp_path / "fours.safetensors", save_to=tmp_path / "out.safetensors", unit=3)
    assert "was trained with unit 2" in capsys.readouterr().err
    tool(model=tmp_path / "fours.safetensors", save_to=tmp_path / "out.safetensors")
    assert capsys.readouterr().out.count(" written\n") == 3
    with safe_open(tmp_path / "out-0004.safetensors", "pt") as file:
        made_by = json.loads(file.metadata()["ss_made_by"])
    told = {"name": "fours.safetensors", "sha256": hash_file(tmp_path / "fours.safetensors").sha256}
    assert made_by == {"tool": "networks/extract_lora_from_dylora.py", "sources": [told], "rank": 4}
    save_file(load_file(dylora_file), tmp_path / "lora.safetensors", {"ss_network_module": "networks.lora"})
    tool(model=tmp_path / "lora.safetensors", save_to=tmp_path / "out.safetensors", unit=3)
    assert "its first ranks are no networks by themselves" in capsys.readouterr().err


def test_factors_of_8_bits_stay_what_they_are(tool, dylora_file, tmp_path):
    small = {
        name: tensor.to(torch.float8_e4m3fn) if name.endswith(".weight") else tensor
        for name, tensor in load_file(dylora_file).items()
    }
    save_file(small, tmp_path / "small.safetensors")
    tool(model=tmp_path / "small.safetensors", save_to=tmp_path / "out.safetensors", unit=3)
    written = load_file(tmp_path / "out-0003.safetensors")
    name = next(name for name in small if name.endswith("lora_down.weight"))
    assert written[name].dtype == torch.float8_e4m3fn
    assert torch.equal(written[name].float(), small[name][:3].float())
