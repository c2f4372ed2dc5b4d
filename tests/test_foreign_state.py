"""States that accelerate wrote by itself, in the way of the toolkit whose command lines we take."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from library.models.registry import load_model
from networks.lora import LoRANetwork, create_network
from tests.tiny import read_logs, scalars


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_state(folder: Path, modules: list[nn.Module], optimizer: torch.optim.Optimizer, step: int | None) -> Path:
    """What a script with these prepared modules writes by `Accelerator.save_state`."""
    forget()
    accelerator = Accelerator(cpu=True)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    prepared = accelerator.prepare(*modules, optimizer, scheduler)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.full_like(parameter, 0.5)
    for _ in range(2):
        prepared[-2].step()
        prepared[-1].step()
    accelerator.save_state(str(folder))
    if step is not None:
        (folder / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": step}))
    forget()
    return folder


@pytest.fixture(scope="module")
def network(model_file) -> LoRANetwork:
    model = load_model(model_file)
    points = model.attach_points()
    torch.manual_seed(0)
    network = create_network(1.0, 4, 1, model.vae, points.text_encoders[0], points.unet)
    network.apply_to(points.text_encoders[0], points.unet)
    return network


def of_network(folder: Path, network: LoRANetwork, step: int | None = None, kind: type = torch.optim.AdamW) -> Path:
    groups, _ = network.prepare_optimizer_params(None, None, 0.01)
    return write_state(folder, [network], kind(groups), step)


@pytest.fixture
def run(train, flags, tmp_path, capsys) -> Callable[..., str]:
    """`run(**changes)` trains into the folder `out` and returns what was said, mistakes included."""

    def start(script: str = "train_network", **changes: object) -> str:
        capsys.readouterr()
        with suppress(SystemExit):
            train(flags(tmp_path / "out", **changes), script=script)
        return capsys.readouterr().err

    return start


def objects_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "objects.safetensors")


def test_weights_and_optimizer_go_on(run, network, tmp_path):
    state = of_network(tmp_path / "last-state", network, step=2)
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin"} <= {path.name for path in state.iterdir()}
    changes = {"save_state": True, "logging_dir": tmp_path / "logs", "max_train_steps": 3, "learning_rate": 1e-30}
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4}
    message = run(resume=state, resume_new_learning_rate=True, **changes, **warmup)
    assert "written by accelerate alone and gives weights and optimizer, but no more: it counts as of step 2" in message
    weights = load_file(tmp_path / "out" / "run.safetensors")
    for name, tensor in load_file(state / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    optimizer = torch.load(state / "optimizer.bin", weights_only=True)
    taken = objects_of(tmp_path / "out" / "run-state")
    for number, entry in optimizer["state"].items():
        change = taken[f"optimizer.state.{number}.exp_avg"] - 0.9 * entry["exp_avg"]
        assert change.abs().max() < 0.05  # a new one would be 0.0855 away
        assert taken[f"optimizer.state.{number}.step"] == 3
    assert scalars(read_logs(tmp_path / "logs"), "lr/unet") == pytest.approx({3: 0.5e-30})


def test_without_a_count_it_starts_at_step_1_again(run, network, tmp_path):
    state = of_network(tmp_path / "last-state", network)
    message = run(resume=state, max_train_steps=2, save_every_n_steps=2)
    assert "steps are counted from 1 again, unless --initial_step is given. The images come in another order" in message
    assert (tmp_path / "out" / "run-step00000002.safetensors").exists()
    message = run(resume=state, max_train_steps=6, save_every_n_steps=6, initial_step=5, skip_until_initial_step=True)
    assert "it counts as of step 5" in message
    assert (tmp_path / "out" / "run-step00000006.safetensors").exists()
    assert "but a flag says" not in message


def test_an_optimizer_that_does_not_fit_starts_anew(run, network, tmp_path):
    state = of_network(tmp_path / "a", network)
    message = run(resume=state, max_train_steps=1, optimizer_type="Prodigy", learning_rate=1)
    assert "optimizer.bin is of another optimizer than Prodigy, so this one starts anew" in message
    message = run(resume=state, max_train_steps=1, network_train_unet_only=True)
    assert "the optimizer starts anew, because the state's does not fit what is trained" in message
    content = torch.load(state / "optimizer.bin", weights_only=True)
    entries = content["state"]
    entries[0], entries[1] = entries[1], entries[0]
    torch.save(content, state / "optimizer.bin")
    message = run(resume=state, max_train_steps=1)
    assert "does not fit what is trained (the optimizer's state of parameter 0 is for the shape" in message
    (state / "optimizer.bin").write_bytes(b"PK")
    assert "optimizer.bin cannot be read, so the optimizer starts anew" in run(resume=state, max_train_steps=1)


def test_weights_that_do_not_fit_are_refused(run, network, tmp_path):
    state = of_network(tmp_path / "a", network)
    message = run(resume=state, network_dim=8)
    assert "error: " in message
    assert "is the state of something else than what these flags train (lora_te_" in message
    assert "alpha is 1 there and 2 here" in run(resume=state, network_alpha=2)
    (state / "model.safetensors").unlink()
    assert "holds no weights to go on with: give another state" in run(resume=state)


def test_fine_tuning_finds_the_unet_and_the_text_encoder(run, tmp_path, pictures, model_file, metadata_file):
    model = load_model(model_file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    modules = [model.unet, OneLevelMore(model.text_encoders[0].model)]
    optimizer = torch.optim.AdamW([{"params": module.parameters()} for module in modules], lr=0.01)
    state = write_state(tmp_path / "state", modules, optimizer, 1)
    assert {"model.safetensors", "model_1.safetensors"} <= {path.name for path in state.iterdir()}
    words = {
        "train_data_dir": pictures / "1_sks shape",
        "in_json": metadata_file,
        "caption_extension": None,
        "network_module": None,
        "train_text_encoder": True,
        "save_state": True,
        "max_train_steps": 2,
        "learning_rate": 1e-30,
        "resume_new_learning_rate": True,
        "optimizer_args": "weight_decay=0",
    }
    message = run("fine_tune", resume=state, **words)
    assert "starts anew" not in message
    trained = load_file(tmp_path / "out" / "run-state" / "trained.safetensors")
    unet, text = (load_file(state / name) for name in ("model.safetensors", "model_1.safetensors"))
    assert torch.equal(trained["unet.conv_in.weight"], unet["conv_in.weight"])
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(trained[f"text_encoder.model.{name}"], text[f"text_model.{name}"])


class OneLevelMore(nn.Module):
    """A text encoder with the names that older packages give."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_model = encoder
