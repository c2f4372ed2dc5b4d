"""LyCORIS, unmodified, as --network_module: what it trains, and that its files have the right names and values."""

import csv
import gzip
import inspect
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.models.family import Family
from library.training.methods.network import NetworkMethod
from library.training.methods.network_module import check_arguments
from networks.lora import find_layers
from tests.full_size import CONFIGS
from tests.test_lora_names import TABLES
from tests.tiny import largest_difference, make_model, stored

kohya = pytest.importorskip("lycoris.kohya")

LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 2}
ALGOS = ("locon", "loha", "lokr", "full", "diag-oft", "boft", "glora")
NOT_MADE_FROM_FILES = ("dylora", "ia3")
"""By LyCORIS 4.1.3: it takes the one for LoCon, and fails on the other."""


@pytest.fixture
def live(monkeypatch):
    """The methods of the runs that follow, with the models that they train beside."""
    methods = []
    build = NetworkMethod.build

    def spied(self, model):
        methods.append(SimpleNamespace(method=self, model=model))
        return build(self, model)

    monkeypatch.setattr(NetworkMethod, "build", spied)
    return methods


@torch.no_grad()
def outputs(model: Family) -> list[torch.Tensor]:
    """What a model makes of a caption and of noise, in evaluation mode."""
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        noisy = torch.randn(1, 4, 16, 16)
        text = model.encode_text(["sks, a red circle"])
        condition = model.condition(text, torch.tensor([[32.0, 32, 0, 0, 32, 32]]))
        return [*text.values(), model.denoise(noisy, torch.tensor([500]), condition)]


@torch.no_grad()
def from_file(family: str, file: Path) -> Family:
    """A fresh model with the network of a file beside it, as other programs put it there."""
    model = make_model(family)
    points = model.attach_points()
    encoders = points.text_encoder
    network, _ = kohya.create_network_from_weights(1.0, str(file), None, encoders, points.unet)
    network.apply_to(encoders, points.unet, True, True)
    model.network = network.eval()
    return model


def assert_as_trained(trained: Family, family: str, file: Path) -> None:
    plain = outputs(make_model(family))
    for live, fresh, before in zip(outputs(trained), outputs(from_file(family, file)), plain, strict=True):
        assert (live - fresh).abs().max() < 1e-4 * live.abs().max()
        assert (live - before).abs().max() > 1e-4 * live.abs().max()


def assert_whole(file: Path, family: str) -> None:
    """All of it is finite, of layers of the model, and with an alpha where the kind has one."""
    tensors, points = load_file(file), make_model(family).attach_points()
    names = {name.partition(".")[0] for name in tensors}
    assert names <= find_layers(points.text_encoder, points.unet).keys()
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    for name in tensors:
        module, _, part = name.partition(".")
        assert f"{module}.alpha" in tensors or not part.startswith(("lora_", "hada_", "lokr_", "oft_")), name


def test_lokr_trains_saves_and_goes_on(train, flags, tmp_path, live):
    words = {**LYCORIS, "network_args": ("algo=lokr", "preset=attn-mlp"), "learning_rate": 0.05}
    train(flags(tmp_path, **words))
    file = tmp_path / "run.safetensors"
    kinds = {name.partition(".")[2] for name in load_file(file)}
    assert {"alpha", "lokr_w1"} < kinds <= {"alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    assert not any("resnets" in name for name in load_file(file))
    assert_whole(file, "sd1")
    assert_as_trained(live[-1].model, "sd1", file)
    still = words | {"learning_rate": 1e-12, "max_train_steps": 1, "network_weights": file}
    for name, changes in (("again", {"network_alpha": 7}), ("made", {"dim_from_weights": True})):
        train(flags(tmp_path / name, **still | changes))
        assert largest_difference(tmp_path / name / "run.safetensors", file) < 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_it_speaks_to_the_log_file_alone(fork_server, flags, tmp_path):
    """Dropout makes it print a warning."""
    log = tmp_path / "log.txt"
    words = {"network_args": ("algo=lokr", "preset=attn-mlp"), "network_dropout": 0.1, "dry_run": True}
    ended = fork_server.run(flags(tmp_path / "out", **LYCORIS, **words, console_log_file=log))
    assert ended.status == 0, ended.said
    assert "LyCORIS" not in ended.said
    assert "WARN" not in ended.said
    assert "create LyCORIS for U-Net" in log.read_text()
    assert "[WARN]" in log.read_text()


@pytest.mark.parametrize("algo", [pytest.param("locon", marks=pytest.mark.slow), "loha"])
def test_files_for_sdxl_have_its_own_names(train, flags, model_files, tmp_path, live, algo):
    words = {**LYCORIS, "network_args": f"algo={algo}", "learning_rate": 0.05, "max_train_steps": 2}
    train(flags(tmp_path, **words, pretrained_model_name_or_path=model_files("sdxl")), sdxl=True)
    file = tmp_path / "run.safetensors"
    assert_whole(file, "sdxl")
    names = {name.partition(".")[0] for name in load_file(file)}
    assert {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_1_mlp_fc2"} < names
    assert {"lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_middle_block_0_out_layers_3"} < names
    assert_as_trained(live[-1].model, "sdxl", file)


def test_a_state_keeps_what_scaled_norms_leave_in_buffers(train, flags, tmp_path):
    """LyCORIS scales a LoCon's norm by a buffer that it does not save, and its files by what they hold."""
    words = {**LYCORIS, "network_args": ("algo=locon", "preset=attn-mlp"), "scale_weight_norms": 0.01}
    words |= {"save_state": True, "save_every_n_steps": 2, "learning_rate": 0.05}
    train(flags(tmp_path / "whole", **words))
    train(flags(tmp_path / "broken", **words, resume=tmp_path / "whole" / "run-step00000002-state"))
    assert stored(tmp_path / "broken" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"network_args": "algo=lokrr"}, "--network_args: LyCORIS has no algo lokrr, only .*, did you mean lokr?"),
        ({"network_args": "preset=attn"}, "--network_args: LyCORIS has no preset attn, only full, full-lin, attn-mlp"),
        (
            {"fp8_base": True, "mixed_precision": "bf16"},
            "--fp8_base: this network of lycoris.kohya computes with the model's weights itself, which it cannot in 8 "
            "bits: drop --fp8_base, or try --network_args bypass_mode=True",
        ),
    ],
)
def test_what_cannot_work_is_refused(train, flags, tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **LYCORIS, **words))
    assert sentence.split(" .*, ")[0] in (error := capsys.readouterr().err)
    assert sentence.split(" .*, ")[-1] in error


def test_names_that_it_does_not_read_are_said(capsys):
    source = inspect.getsource(kohya.create_network)
    read = {*re.findall(r'kwargs\.get\(\s*"(\w+)"', source), *kohya.deprecated_arg_dict}
    assert len(read) > 20
    check_arguments(kohya, dict.fromkeys(sorted(read - {"algo", "preset"}), "1"))
    assert capsys.readouterr().err == ""
    check_arguments(kohya, {"presett": "attn-mlp", "algo": "lokr"})
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("--network_args: LyCORIS does not read presett, it has no effect, did you mean preset?")


@pytest.mark.slow
def test_weights_of_8_bits_are_passed_by(train, flags, tmp_path):
    args = ("algo=lokr", "preset=attn-mlp", "bypass_mode=True")
    words = {"network_args": args, "fp8_base": True, "mixed_precision": "bf16", "max_train_steps": 2}
    train(flags(tmp_path, **LYCORIS, **words))
    assert any(x.any() for name, x in load_file(tmp_path / "run.safetensors").items() if "lokr_w2" in name)


def test_a_dry_run_knows_it_and_one_rate_counts_for_all_text_encoders(train, flags, model_files, tmp_path, capsys):
    words = {**LYCORIS, "network_args": "algo=loha", "pretrained_model_name_or_path": model_files("sdxl")}
    train(flags(tmp_path / "out", **words, text_encoder_lr=(0.03, 0.04), unet_lr=0.02, dry_run=True), sdxl=True)
    out, err = capsys.readouterr()
    assert "this was a dry run" in out
    assert re.search(r"trained: textencoder, .*, learning rate 0.03\n.*unet, .*, learning rate 0.02\n", out)
    assert "take one --text_encoder_lr for all text encoders: 0.03 is used" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "family"), [(algo, family) for algo in ALGOS for family in ("sd1", "sdxl")] + [("loha", "sd2")]
)
def test_algorithms(train, flags, model_files, tmp_path, live, algo, family):
    """Trained, saved, read by LyCORIS in a fresh model, and gone on with."""
    sdxl, file = family == "sdxl", tmp_path / "run.safetensors"
    words = {**LYCORIS, "network_args": f"algo={algo}", "pretrained_model_name_or_path": model_files(family)}
    words |= {"v2": True} if family == "sd2" else {}
    train(flags(tmp_path, **words, learning_rate=0.02, max_train_steps=2, no_rehearsal=None), sdxl=sdxl)
    assert_whole(file, family)
    assert_as_trained(live[-1].model, family, file)
    still = words | {"learning_rate": 1e-12, "max_train_steps": 1, "network_weights": file}
    for name, changes in (("again", {}), ("made", {"dim_from_weights": True})):
        train(flags(tmp_path / name, **still, **changes), sdxl=sdxl)
        assert largest_difference(tmp_path / name / "run.safetensors", file) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("algo", [*ALGOS, *NOT_MADE_FROM_FILES])
@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "full_bf16": True}])
def test_algorithms_in_half_precision(train, flags, tmp_path, algo, changes):
    changes = {**changes, "ema": True, "save_precision": "fp16", "gradient_checkpointing": True}
    train(flags(tmp_path, **LYCORIS, network_args=f"algo={algo}", learning_rate=1e-3, **changes))
    for file in ("run.safetensors", "run-ema.safetensors"):
        assert_whole(tmp_path / file, "sd1")


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["lokr", "loha", "locon"])
def test_weight_decomposition(train, flags, tmp_path, live, algo):
    train(flags(tmp_path, **LYCORIS, network_args=(f"algo={algo}", "dora_wd=True"), learning_rate=0.02))
    assert any(name.endswith(".dora_scale") for name in load_file(tmp_path / "run.safetensors"))
    assert_as_trained(live[-1].model, "sd1", tmp_path / "run.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_all_names_of_the_published_sizes(family):
    """Those of the table of LoRA files, and convolutions and embeddings besides."""
    kind = type(make_model(family))
    with torch.device("meta"):
        model = kind.from_configs(**CONFIGS[family])
    points = model.attach_points()
    encoders = points.text_encoder
    network = kohya.create_network(1.0, 1, 1, None, encoders, points.unet, algo="ia3")
    names = {lora.lora_name for lora in [*network.unet_loras, *network.text_encoder_loras]}
    with gzip.open(TABLES / f"{family}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        published = {row[0] for row in list(csv.reader(stream, delimiter="\t"))[1:]}
    assert published - names == set()
    assert names <= find_layers(encoders, points.unet).keys()


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["lokr", "full"])
def test_two_processes_agree(fork_server, flags, tmp_path, algo):
    words = {**LYCORIS, "network_args": f"algo={algo}", "train_batch_size": 1, "save_every_n_steps": 2}
    ended = fork_server.run(flags(tmp_path, **words), processes=2, how=("telling",))
    assert ended.status == 0, ended.said
    weights = Counter(re.findall(r"WEIGHTS <(\w+)>", ended.said))
    assert len(weights) == 4
    assert set(weights.values()) == {2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_norms_are_trained(fork_server, flags, tmp_path):
    """With weights beside those of the model, whose inputs need no gradients; in a process that may crash."""
    words = {**LYCORIS, "network_args": ("algo=lora", "preset=attn-mlp", "train_norm=True"), "max_train_steps": 2}
    ended = fork_server.run(flags(tmp_path, **words, network_train_unet_only=True))
    assert ended.status == 0, ended.said
    norms = {name: tensor for name, tensor in load_file(tmp_path / "run.safetensors").items() if "w_norm" in name}
    assert any("_norm." in name for name in norms)
    assert all(tensor.count_nonzero() for tensor in norms.values())
