"""A network module of somebody else, which has the required interface and nothing more, in a training run."""

import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.data.config_values import PRESERVES
from library.errors import UserError
from library.models.float8 import store_in_8_bits
from library.options import NetworkOptions, OptimizerOptions
from library.training.methods.network import NetworkMethod
from tests.tiny import make_model, stored

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


HOOKS = (
    "create_network",
    "prepare_network",
    "apply_to",
    "prepare_grad_etc",
    "prepare_optimizer_params",
    "prepare_optimizer_params_with_multiple_te_lrs",
    "enable_gradient_checkpointing",
    "on_epoch_start",
    "set_multiplier",
    "on_step_start",
    "update_grad_norms",
    "apply_max_norm_regularization",
    "save_weights",
)
ALWAYS_THERE = ("apply_to", "prepare_grad_etc", "prepare_optimizer_params", "on_epoch_start", "save_weights")


def go_through(method: NetworkMethod, folder: Path) -> None:
    """All that a run asks of a network."""
    method.build(make_model())
    method.parameter_groups()
    method.enable_gradient_checkpointing()
    method.on_micro_step(SimpleNamespace(plan=SimpleNamespace(epoch=1), network_multiplier=0.5))
    method.before_step()
    method.after_step(1)
    method.save(folder / "run", torch.float32, {})


def method_of(module: str = "somebodys.factors", **changes: object) -> NetworkMethod:
    return NetworkMethod(NetworkOptions(network_module=module, **changes), OptimizerOptions())


@pytest.mark.parametrize("hook", HOOKS)
def test_whatever_fails_in_it_is_one_sentence_that_names_it(somebodys, monkeypatch, tmp_path, hook):
    """Also an error that looks as if values of a model were missing."""

    def fail(*positional, **named):
        raise RuntimeError("the metadata is\nodd")

    monkeypatch.setattr(somebodys.Factors, "set_multiplier", lambda self, value: None, raising=False)
    monkeypatch.setattr(somebodys if hook == "create_network" else somebodys.Factors, hook, fail, raising=False)
    with pytest.raises(UserError, match=f"{hook} of somebodys.factors fails: the metadata is odd$"):
        go_through(method_of(scale_weight_norms=1.0 if "norm_reg" in hook else None), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("hook", ALWAYS_THERE)
def test_what_it_lacks_is_named(somebodys, monkeypatch, tmp_path, hook):
    monkeypatch.setattr(somebodys.Factors, "set_multiplier", lambda self, value: None, raising=False)
    monkeypatch.delattr(somebodys.Factors, hook)
    with pytest.raises(UserError, match=f"{hook} of somebodys.factors fails: 'Factors' object has no attribute"):
        go_through(method_of(), tmp_path / "out")


def test_groups_may_lack_names_and_rates_and_what_has_no_effect_is_said(somebodys, monkeypatch):
    said = []
    monkeypatch.setattr("library.training.methods.network_groups.warn", said.append)

    def groups(self, text_encoder_lr, unet_lr, default_lr):
        te, *unet = self.factors.values()
        return [{"params": iter([te]), "lr": None, "weight_decay": 0.1}, {"params": unet, "lr": "0.5"}], ["one"]

    monkeypatch.setattr(somebodys.Factors, "prepare_optimizer_params", groups)
    method = method_of()
    method.build(make_model())
    found = [(group.name, len(group.parameters), group.learning_rate) for group in method.parameter_groups()]
    assert found == [("group0", 1, method.default_rate), ("group1", len(method.network.factors) - 1, 0.5)]
    (sentence,) = said
    assert "prepare_optimizer_params of somebodys.factors gives weight_decay with its parameters" in sentence
    for answer in (None, [somebodys.Factors({})], [{"lr": 1.0}]):
        monkeypatch.setattr(somebodys.Factors, "prepare_optimizer_params", lambda self, *rates, answer=answer: answer)
        with pytest.raises(UserError, match=r"prepare_optimizer_params of somebodys\.factors fails: "):
            method.parameter_groups()


@pytest.mark.parametrize(
    ("own", "key"), [({"network_multiplier": 0.5}, "network_multiplier"), ({}, "subsets[0].custom_attributes")]
)
def test_datasets_that_ask_for_another_strength_are_refused_before_training(
    train, flags, pictures, tmp_path, somebodys, monkeypatch, capsys, own, key
):
    def take_the_weights(self, *places):
        for layer in self.layers.values():
            weight = layer.weight
            del layer.weight
            layer.forward = lambda x, weight=weight: x @ weight.T

    monkeypatch.setattr(somebodys.Factors, "apply_to", take_the_weights)
    subset = {"image_dir": str(pictures / "1_sks shape"), "caption_extension": ".txt"}
    subset["custom_attributes"] = {PRESERVES: not own}
    (tmp_path / "data.json").write_text(
        json.dumps({"datasets": [{"resolution": 32, "batch_size": 1, **own, "subsets": [subset]}]})
    )
    common = {"train_data_dir": None, "caption_extension": None, "train_batch_size": None, "dry_run": True}
    words = flags(tmp_path / "out", network_module="somebodys.factors", dataset_config=tmp_path / "data.json", **common)
    with pytest.raises(SystemExit, match="2"):
        train(words)
    assert f"data.json: datasets[0].{key}: networks of somebodys.factors " in capsys.readouterr().err


def test_a_run_whose_network_cannot_write_its_file_keeps_its_state(
    train, flags, tmp_path, somebodys, monkeypatch, capsys
):
    words = flags(tmp_path / "out", network_module="somebodys.factors", save_every_n_steps=1)
    save = somebodys.Factors.save_weights

    def fail(self, *arguments):
        raise ValueError("no colour left")

    def overflow(self, file, dtype, metadata):
        with torch.no_grad():
            next(self.parameters()).fill_(1e30)
        save(self, file, torch.float16, metadata)

    sentence = "save_weights of somebodys.factors fails: "
    for change, problem in ((fail, "no colour left"), (overflow, "what it writes as float is not finite (1 of ")):
        monkeypatch.setattr(somebodys.Factors, "save_weights", change)
        with pytest.raises(SystemExit, match="2"):
            train([*words, "--save_precision=float"])
        said = capsys.readouterr().err
        assert f"warning: --network_module: {sentence}{problem}".replace("float is", "float32 is") in said
        assert "; --resume latest tries it again" in said.splitlines()[-1]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["run-step00000004-state"]
    monkeypatch.setattr(somebodys.Factors, "save_weights", save)
    train([*words, "--resume=latest"])
    assert (tmp_path / "out" / "run.safetensors").is_file()


def test_weights_of_8_bits_are_blamed_for_their_own_errors_alone(somebodys, monkeypatch, tmp_path):
    def fail(*positional, **named):
        raise RuntimeError(said)

    def sentence(model):
        with pytest.raises(UserError) as raised:
            method_of(network_weights=str(file), dim_from_weights=True).build(model)
        return str(raised.value)

    (tmp_path / "float8").mkdir()
    file = tmp_path / "float8" / "old.pt"
    torch.save({"x": torch.ones(1)}, file)
    monkeypatch.setattr(somebodys, "create_network_from_weights", fail, raising=False)
    rounded = make_model()
    store_in_8_bits(rounded.unet)
    said = "no addition for Float8_e4m3fn"
    assert sentence(rounded).startswith("--fp8_base: this network of somebodys.factors computes with")
    assert sentence(make_model()).endswith("no addition for Float8_e4m3fn")
    said = "odd"
    assert sentence(rounded).endswith("float8/old.pt: create_network_from_weights of somebodys.factors fails: odd")


@pytest.mark.parametrize("words", [{"network_module": "lycoris.kohya"}, {"base_weights": "glora.safetensors"}])
def test_what_to_install_for_lycoris_is_said(train, flags, tmp_path, monkeypatch, capsys, words):
    if "base_weights" in words:
        words = {"base_weights": tmp_path / "glora.safetensors"}
        save_file({"lora_unet_mid_block_attentions_0_proj_in.a1.weight": torch.ones(2, 2)}, words["base_weights"])

    def find(name, *others):
        if name == "lycoris":
            raise ModuleNotFoundError("No module named 'lycoris'", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "lycoris"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find), *sys.meta_path])
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", **words))
    assert "lycoris.kohya needs the package lycoris: pip install lycoris-lora" in capsys.readouterr().err
