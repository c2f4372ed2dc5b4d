"""--network_weights: runs that go on from a network's file, and what does not fit."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.options import NetworkOptions, ResumeOptions, Settings
from library.training.methods.network_weights import check_fit, read_network
from networks.lora import create_network, find_layers
from tests.tiny import make_model, stored

STILL = {"learning_rate": 1e-12, "max_train_steps": 1}
"""A step that moves nothing far enough to be seen."""


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A file of rank 3 and alpha 2 for the tiny model of Stable Diffusion 1.x."""
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", "sd1")


def write_lora(path: Path, family: str, rank: int = 3, alpha: float = 2) -> Path:
    points = make_model(family).attach_points()
    network = create_network(1.0, rank, alpha, None, points.text_encoder, points.unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_weights(path)
    return path


def changed(source: Path, target: Path, change) -> Path:
    tensors = load_file(source)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, target)
    return target


def assert_close(file: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = load_file(file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.fixture
def refused(train, flags, tmp_path, capsys):
    """`refused(**changes)`: the sentence of a run that is refused, and that reads no weights."""

    def run(sdxl: bool = False, **changes: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            train(flags(tmp_path / "refused", **changes), sdxl=sdxl)
        (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return sentence

    return run


def test_training_goes_on_from_the_file(train, flags, tmp_path, lora):
    train(flags(tmp_path, network_weights=lora, network_dim=3, network_alpha=2, **STILL))
    assert_close(tmp_path / "run.safetensors", load_file(lora))


def test_ranks_and_alphas_come_from_the_file(train, flags, tmp_path, lora, capsys):
    def mixed(tensors):
        """One module of rank 1 and alpha 5, and only half of the modules."""
        names = sorted({name.partition(".")[0] for name in tensors})[::2]
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in names}
        first = names[0]
        tensors[f"{first}.lora_down.weight"] = tensors[f"{first}.lora_down.weight"][:1]
        tensors[f"{first}.lora_up.weight"] = tensors[f"{first}.lora_up.weight"][:, :1]
        tensors[f"{first}.alpha"] = torch.tensor(5.0)
        return tensors

    source = changed(lora, tmp_path / "mixed.safetensors", mixed)
    file = tmp_path / "out" / "run.safetensors"
    train(flags(file.parent, network_weights=source, dim_from_weights=True, network_dim=64, **STILL))
    assert "--network_dim has no effect with --dim_from_weights" in capsys.readouterr().err
    assert_close(file, load_file(source))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    train(flags(tmp_path / "one", network_weights=lora, dim_from_weights=True, **STILL))
    with safe_open(tmp_path / "one" / "run.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("3", "2.0")


def test_a_part_of_the_network_goes_on(train, flags, tmp_path, lora, capsys):
    unet = changed(
        lora, tmp_path / "unet.safetensors", lambda t: {n: x for n, x in t.items() if n.startswith("lora_unet_")}
    )
    train(flags(tmp_path, network_weights=unet, network_dim=3, network_alpha=2, **STILL))
    assert re.search(r"unet.safetensors has nothing for 6 of the network's \d+ modules", capsys.readouterr().err)
    saved = load_file(tmp_path / "run.safetensors")
    assert all(x.abs().max() < 1e-6 for n, x in saved.items() if n.startswith("lora_te_") and "lora_up" in n)
    for name, tensor in load_file(unet).items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-6)


def test_names_of_diffusers_are_read_for_sdxl(train, flags, model_files, tmp_path):
    source = write_lora(tmp_path / "sdxl.safetensors", "sdxl")
    model = make_model("sdxl")
    layers = {id(layer): name for name, layer in find_layers(None, model.attach_points().unet).items()}
    names = {
        layers[id(layer)]: "lora_unet_" + path.replace(".", "_")
        for path, layer in model.unet.named_modules()
        if id(layer) in layers
    }

    def renamed(tensors):
        parts = {name: name.partition(".") for name in tensors}
        return {names.get(head, head) + dot + tail: tensors[name] for name, (head, dot, tail) in parts.items()}

    theirs = changed(source, tmp_path / "theirs.safetensors", renamed)
    assert any("down_blocks" in name for name in load_file(theirs))
    model_file = model_files("sdxl")
    words = {"pretrained_model_name_or_path": model_file, "network_weights": theirs, "dim_from_weights": True}
    train(flags(tmp_path / "out", **words, **STILL), sdxl=True)
    assert_close(tmp_path / "out" / "run.safetensors", load_file(source))


def test_the_alpha_of_the_file_is_used_and_a_state_knows_it(train, flags, tmp_path, lora, capsys):
    source = tmp_path / "source.safetensors"
    source.write_bytes(lora.read_bytes())
    changes = {"network_weights": source, "network_dim": 3}
    train(flags(tmp_path / "still", **changes, **STILL))
    assert_close(tmp_path / "still" / "run.safetensors", load_file(lora))
    assert capsys.readouterr().err.count("warning: --network_weights: the file's alpha 2 is used, not 1\n") == 1
    with safe_open(tmp_path / "still" / "run.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == "2.0"


def test_a_state_wins_over_the_file_and_knows_its_alpha(train, flags, tmp_path, lora, capsys):
    """Also in the run after the next, of which no file was ever heard."""
    source = tmp_path / "source.safetensors"
    source.write_bytes(lora.read_bytes())
    words = {"network_dim": 3, "save_state": True, "save_every_n_steps": 2}
    train(flags(tmp_path / "whole", **words, network_weights=source, max_train_steps=6))
    source.unlink()
    capsys.readouterr()
    first = {"resume": tmp_path / "whole" / "run-step00000002-state", "max_train_steps": 4}
    train(flags(tmp_path / "broken", **words, **first, network_weights=source))
    then = {"resume": tmp_path / "broken" / "run-step00000004-state", "max_train_steps": 6}
    train(flags(tmp_path / "again", **words, **then))
    assert "network_alpha" not in capsys.readouterr().err
    assert stored(tmp_path / "again" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")


def test_several_alphas_and_another_rank_are_refused(refused, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("library.training.launch.build", None)  # before the model is read
    sentence = (
        "--network_weights: .*lora.safetensors has rank 3 for lora_te_.*, not 4: give --network_dim 3 or --dim_fr"
    )
    assert re.search(sentence, refused(network_weights=lora))

    def two_alphas(tensors):
        first = min(name for name in tensors if name.endswith(".alpha"))
        return tensors | {first: torch.tensor(5.0)}

    mixed = changed(lora, tmp_path / "mixed.safetensors", two_alphas)
    sentence = "--network_weights: .*mixed.safetensors has alpha 5 for lora_te_.*, not 1: give --dim_from_weights$"
    assert re.search(sentence, refused(network_weights=mixed, network_dim=3))


@pytest.mark.parametrize(
    "changes",
    [{"network_dim": 3}, {"dim_from_weights": True, "network_module": "lycoris.kohya"}],
    ids=["ours", "lycoris"],
)
def test_without_an_alpha_it_is_the_rank(train, flags, tmp_path, lora, changes):
    old = changed(lora, tmp_path / "old.safetensors", lambda t: {n: x for n, x in t.items() if "alpha" not in n})
    train(flags(tmp_path / "out", network_weights=old, **changes, **STILL))
    weights = load_file(old)
    alphas = {n.replace("lora_down.weight", "alpha"): torch.tensor(3.0) for n in weights if "lora_down" in n}
    assert_close(tmp_path / "out" / "run.safetensors", weights | alphas)


def test_networks_that_know_no_alpha_need_none(lora):
    own = nn.Module()
    for name, tensor in read_network(lora).items():
        module, _, part = name.partition(".")
        if part != "alpha":
            own.add_module(module, inner := getattr(own, module, nn.Module()))
            inner.add_module(part.partition(".")[0], layer := nn.Module())
            layer.weight = nn.Parameter(tensor)
    tensors = read_network(lora)
    for name in tensors:
        if name.endswith("alpha"):
            tensors[name] = torch.tensor(3.0)  # the rank
    check_fit(own, "somebodys.network", lora, tensors, made_from_it=False)
    with pytest.raises(UserError, match="is of another kind of network"):
        check_fit(own, "somebodys.network", lora, read_network(lora), made_from_it=False)


def test_other_formats_are_read(train, flags, tmp_path, lora):
    words = {"network_dim": 3, "network_alpha": 2, **STILL}
    train(flags(tmp_path / "first", network_weights=lora, save_model_as="pt", **words))
    train(flags(tmp_path / "next", network_weights=tmp_path / "first" / "run.pt", **words))
    assert_close(tmp_path / "next" / "run.safetensors", load_file(lora))


def test_one_part_of_a_whole_network_goes_on(train, flags, tmp_path, lora, capsys):
    words = {"network_weights": lora, "network_dim": 3, "network_alpha": 2}
    train(flags(tmp_path, **words, network_train_unet_only=True, **STILL))
    assert re.search(r"6 of the \d+ modules in .*lora.safetensors are not of this network", capsys.readouterr().err)
    assert_close(tmp_path / "run.safetensors", {n: x for n, x in load_file(lora).items() if n.startswith("lora_unet")})


def test_two_processes_begin_with_the_same(fork_server, flags, tmp_path, lora):
    words = {"network_weights": lora, "network_dim": 3, "train_batch_size": 1, **STILL, "save_every_n_steps": 1}
    ended = fork_server.run(flags(tmp_path, **words), processes=2, how=("telling",))
    assert ended.status == 0, ended.said
    weights = Counter(re.findall(r"WEIGHTS <(\w+)>", ended.said))
    assert set(weights.values()) == {2}
    assert_close(tmp_path / "run.safetensors", load_file(lora))


def test_a_missing_file_is_refused_unless_a_state_replaces_it(lora):
    options = NetworkOptions("networks.lora", network_weights=str(lora.with_name("lore.safetensors")))
    with pytest.raises(UserError, match=r"--network_weights: .* is no file, did you mean .*lora\.safetensors\?"):
        options.check(Settings({ResumeOptions: ResumeOptions()}, frozenset()))
    options.check(Settings({ResumeOptions: ResumeOptions(resume="latest")}, frozenset()))
    with pytest.raises(UserError, match="--dim_from_weights takes ranks from a file: give --network_weights one"):
        NetworkOptions("networks.lora", dim_from_weights=True)


def test_files_of_something_else_are_refused(refused, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("library.training.launch.build", None)

    def loha(tensors):
        return {name.replace("lora_down.weight", "hada_w1_a"): tensor for name, tensor in tensors.items()}

    def tucker(tensors):
        downs = [name for name in tensors if "lora_down" in name]
        return tensors | {name.replace("lora_down.weight", "lora_mid.weight"): torch.ones(1) for name in downs}

    for change, dims in ((loha, {}), (tucker, {"dim_from_weights": True})):
        other = changed(lora, tmp_path / f"{change.__name__}.safetensors", change)
        sentence = refused(network_weights=other, **dims)
        assert f"{change.__name__}.safetensors is of another kind of network, lora_te_" in sentence
    sdxl = write_lora(tmp_path / "sdxl.safetensors", "sdxl")
    nothing = changed(sdxl, tmp_path / "no.safetensors", lambda t: {f"other_{n}": x for n, x in t.items()})
    assert "no.safetensors fits this network, it is of another kind of model" in refused(network_weights=nothing)
    sd2 = write_lora(tmp_path / "sd2.safetensors", "sd2")
    wider = changed(
        sd2,
        tmp_path / "wider.safetensors",
        lambda t: {n: torch.cat([x, x], 1) if "lora_down" in n else x for n, x in t.items()},
    )
    assert "so it was made for another kind of model" in refused(network_weights=wider, network_dim=3)


def test_files_for_another_family_are_named_as_such(refused, tmp_path, model_files):
    sdxl, sd2 = (write_lora(tmp_path / f"{family}.safetensors", family) for family in ("sdxl", "sd2"))
    for dims in ({}, {"dim_from_weights": True}):
        sentence = refused(network_weights=sdxl, **dims)
        assert sentence.endswith(
            "sdxl.safetensors is for SDXL, and this model is Stable Diffusion 1.x: give one for that"
        )
    told = tmp_path / "told.safetensors"
    unet = {name: tensor for name, tensor in load_file(sd2).items() if name.startswith("lora_unet")}
    save_file(unet, told, {"ss_base_model_version": "sd_v2"})
    assert "is for Stable Diffusion 2.x, and this" in refused(network_weights=told, network_dim=3)
    model = model_files("sdxl")
    assert "is for Stable Diffusion 1.x or 2.x, and this model is SDXL" in refused(
        sdxl=True, network_weights=sd2, pretrained_model_name_or_path=model
    )
