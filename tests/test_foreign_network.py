"""A network module of somebody else, which has the required interface and nothing more, in a training run."""

import importlib
import logging
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny import stored

MODULE = '''
"""Learns a factor for the output of every query projection. Says what is done to it in `said`."""

import torch
from safetensors.torch import save_file

said = []


class Factors(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.factors = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(1)) for name in layers})

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        said.append(("apply_to", apply_text_encoder, apply_unet))
        for name, layer in self.layers.items():
            layer.forward = lambda x, name=name, forward=layer.forward: forward(x) * self.factors[name]

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        said.append(("prepare_optimizer_params", text_encoder_lr, unet_lr, default_lr))
        return [{"params": list(self.factors.values()), "lr": default_lr}]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def enable_gradient_checkpointing(self):
        said.append(("enable_gradient_checkpointing",))

    def on_epoch_start(self, text_encoder, unet):
        said.append(("on_epoch_start", type(unet.mid_block.attentions._modules["0"]).__name__))
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        said.append(("save_weights", self.training))
        save_file({name: factor.detach().to(dtype) for name, factor in self.factors.items()}, file, metadata)


def create_network(
    multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **network_args
):
    said.append(("create_network", multiplier, network_dim, network_alpha, neuron_dropout, network_args))
    layers = {}
    for prefix, root in (("te", text_encoder), ("unet", unet)):
        for name, module in root.named_modules():
            if name.endswith(("to_q", "q_proj")):
                layers[f"{prefix}.{name}".replace(".", "_")] = module
    return Factors(layers)
'''


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """`own_file(text)`: mynet.py with that text, in a folder that is the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text=MODULE):
        (folder / "mynet.py").write_text(text)
        return folder / "mynet.py"

    yield write
    sys.modules.pop("mynet", None)


@pytest.fixture
def somebodys(tmp_path, monkeypatch):
    """The module, importable by the name `somebodys.factors`."""
    package = tmp_path / "packages" / "somebodys"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "factors.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(package.parent))
    yield importlib.import_module("somebodys.factors")
    for name in ("somebodys", "somebodys.factors"):
        sys.modules.pop(name)


def test_it_trains_saves_and_is_called_as_agreed(train, flags, tmp_path, somebodys):
    words = flags(
        tmp_path / "out",
        network_module="somebodys.factors",
        network_dim=3,
        network_alpha=2,
        network_dropout=0.25,
        network_args=("power=2", "kind=full"),
        unet_lr=0.02,
        gradient_checkpointing=True,
        max_train_epochs=2,
    )
    train(words)
    said = somebodys.said
    assert said[0] == ("create_network", 1.0, 3, 2.0, 0.25, {"power": "2", "kind": "full", "dropout": 0.25})
    assert ("apply_to", True, True) in said
    assert ("prepare_optimizer_params", None, 0.02, 0.01) in said
    assert ("enable_gradient_checkpointing",) in said
    assert [call for call in said if call[0] == "on_epoch_start"] == [("on_epoch_start", "Transformer2DModel")] * 2

    file = tmp_path / "out" / "run.safetensors"
    weights = load_file(file)
    assert "te_text_model_encoder_layers_0_self_attn_q_proj" in weights
    assert "unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q" in weights
    assert all(1e-5 < (weight - 1).abs() < 0.1 for weight in weights.values())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "somebodys.factors"
    assert len(metadata["sshs_model_hash"]) == 64
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.safetensors"]


def test_its_optional_calls_are_made(train, flags, tmp_path, somebodys, monkeypatch):
    said = somebodys.said

    def several(self, text_encoder_lrs, unet_lr, default_lr):
        said.append(("several", text_encoder_lrs, unet_lr, default_lr))
        te = [factor for name, factor in self.factors.items() if name.startswith("te_")]
        unet = [factor for name, factor in self.factors.items() if name.startswith("unet_")]
        return [{"params": te, "lr": text_encoder_lrs[0]}, {"params": unet}], ["words", "pictures"]

    network = somebodys.Factors
    monkeypatch.setattr(network, "prepare_optimizer_params_with_multiple_te_lrs", several, raising=False)
    monkeypatch.setattr(network, "on_step_start", lambda self: said.append(("on_step_start",)), raising=False)
    words = flags(tmp_path, network_module="somebodys.factors", text_encoder_lr=0.03, gradient_accumulation_steps=2)
    train([*words, "--network_train_unet_only", "--max_train_epochs", "1"])
    assert ("several", [0.03], None, 0.01) in said
    assert ("apply_to", False, True) in said
    assert said.count(("on_step_start",)) == 3


def test_it_goes_on_with_a_state(train, flags, tmp_path, somebodys):
    changes = {"network_module": "somebodys.factors", "save_state": True, "save_every_n_steps": 2}
    train(flags(tmp_path / "whole", **changes))
    train(flags(tmp_path / "broken", **changes, resume=tmp_path / "whole" / "run-step00000002-state"))
    assert stored(tmp_path / "broken" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")


def test_what_it_refuses_is_the_users_mistake(train, flags, tmp_path, somebodys, monkeypatch, capsys):
    def refuse(*positional, **named):
        raise ValueError("rank 4 is odd")

    monkeypatch.setattr(somebodys, "create_network", refuse)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, network_module="somebodys.factors"))
    assert "somebodys.factors refuses them: rank 4 is odd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mynet", "../here/mynet.py"])
def test_a_file_of_the_users_own_trains(train, flags, tmp_path, own_file, name):
    own_file()
    train(flags(tmp_path / "out", network_module=name, max_train_steps=1))
    with safe_open(tmp_path / "out" / "run.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "mynet"


def test_errors_in_a_file_of_the_users_own_are_one_sentence(train, flags, tmp_path, own_file, capsys, caplog):
    """Its traceback is in the log."""

    def refused():
        sys.modules.pop("mynet", None)
        importlib.invalidate_caches()
        caplog.clear()
        with pytest.raises(SystemExit, match="2"), caplog.at_level(logging.WARNING):
            train(flags(tmp_path / "out", network_module="mynet"))
        return capsys.readouterr().err

    own_file("import torch\nraise KeyError('colour')  # too early")
    assert "error: --network_module mynet cannot be imported: KeyError: 'colour'\n" in refused()
    assert "raise KeyError('colour')" in caplog.text
    own_file("x = 1  # here is a longer file\ndef create_network(*positional, **named):\n    return {}['rank']\n")
    assert "create_network of mynet fails: KeyError: 'rank'\n" in refused()
    assert "return {}['rank']" in caplog.text
    own_file("import a_package_that_is_not_there")
    assert "needs the package a_package_that_is_not_there: pip install" in refused()


def test_a_missing_file_of_the_users_own_is_refused_before_torch_is_read(train, flags, tmp_path, own_file, capsys):
    own_file()
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", network_module=str(tmp_path / "here" / "mynets.py")))
    assert "mynets.py is no file, did you mean" in capsys.readouterr().err


def test_it_goes_on_with_a_file(train, flags, tmp_path, somebodys, monkeypatch):
    """Whatever names its file has; one that is not taken over is no silent new start."""

    def load(self, file):
        self.load_state_dict({f"factors.{name}": factor for name, factor in load_file(file).items()})

    somebodys.Factors.load_weights = load
    first = tmp_path / "first" / "run.safetensors"
    train(flags(first.parent, network_module="somebodys.factors", max_train_steps=2))
    words = {"network_module": "somebodys.factors", "network_weights": first}
    train(flags(tmp_path / "next", **words, learning_rate=1e-12, max_train_steps=1))
    before, after = load_file(first), load_file(tmp_path / "next" / "run.safetensors")
    assert all((before[name] - after[name]).abs() < 1e-6 < (before[name] - 1).abs() for name in before)
    monkeypatch.setattr(somebodys.Factors, "load_weights", lambda self, file: None)
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "none", **words))


def test_it_is_shown_all_flags(train, flags, tmp_path, somebodys, monkeypatch):
    shown = []
    monkeypatch.setattr(somebodys.Factors, "prepare_network", lambda self, args: shown.append(args), raising=False)
    train(flags(tmp_path, network_module="somebodys.factors", network_args=("kind=full",), max_train_steps=1))
    (args,) = shown
    assert (args.network_args, args.learning_rate, args.output_dir) == (["kind=full"], 0.01, str(tmp_path))
