"""Samples whose target is what the model says without the network: `custom_attributes.diff_output_preservation`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from library.data.batch import Batch
from library.data.config_values import PRESERVES
from library.errors import UserError
from library.models.noise import sample_noise
from library.options import NetworkOptions, ObjectiveOptions, OptimizerOptions
from library.training import preservation
from library.training.device.compilation import compile_blocks
from library.training.methods.network import NetworkMethod
from library.training.preservation import check_engine
from library.training.step import TrainingStep
from tests.pictures import dataset, subset
from tests.test_foreign_network import MODULE
from tests.test_training import PROPORTIONAL, assert_equal_to_rounding
from tests.tiny import draw_pictures, largest_difference, make_model, read_log, scalars, stored

NETWORKS = {
    "lora": {"network_module": "networks.lora", "network_dropout": 0.5},
    "of the U-Net": {"network_module": "networks.lora", "network_train_unet_only": True},
    "weights decomposed": {"network_module": "lycoris.kohya", "network_args": ("algo=locon", "dora_wd=True")},
    "takes the weights": {"network_module": "lycoris.kohya", "network_args": ("algo=full", "module_dropout=0.5")},
    "without a multiplier": {"network_module": "factors_of_somebody"},
}
CAPTIONS = ["a circle", "a square", "a red star"]


@pytest.fixture
def factors(tmp_path, monkeypatch) -> None:
    """A network module of somebody that has nothing to set a multiplier with."""
    (tmp_path / "factors_of_somebody.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("factors_of_somebody", None)


@pytest.fixture
def made() -> Callable[..., tuple[TrainingStep, NetworkMethod]]:
    """`made(**options)`: the step of a network with weights that change what the model says, in training mode."""

    def make(timesteps: str | None = None, **options: object) -> tuple[TrainingStep, NetworkMethod]:
        method = NetworkMethod(NetworkOptions(**options), OptimizerOptions())
        model = make_model()
        torch.manual_seed(0)  # first weights
        trained = method.build(model)
        generator = torch.Generator().manual_seed(1)
        strength = 2.0 if options["network_module"] == "factors_of_somebody" else 0.05
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
        objective = ObjectiveOptions(timestep_distribution=timesteps) if timesteps else ObjectiveOptions()
        step = TrainingStep(model, trained, model.noise_process(), objective, method.preservation())
        return step.train(), method

    return make


def batch_of(*marked: int, **changes: object) -> Batch:
    values: dict[str, object] = {
        "plan": SimpleNamespace(epoch=0),
        "seeds": [1, 2, 3],
        "records": [0, 1, 2],
        "captions": CAPTIONS,
        "images": None,
        "latents": sample_noise((4, 8, 8), [11, 12, 13]) * 3,
        "text": None,
        "sizes": torch.zeros(3, 6),
        "loss_mask": None,
        "weights": torch.tensor([1.0, 0.5, 2.0]),
        "custom_attributes": [{PRESERVES: index in marked, "other": 1} for index in range(3)],
    }
    return Batch(**values | changes)


def losses_of(step: TrainingStep, batch: Batch) -> Tensor:
    torch.manual_seed(5)  # as the loop does before each micro-batch
    return step(batch)


def answers(step: TrainingStep, batch: Batch) -> Tensor:
    """What a model says in a batch's training, (B, 4, h, w)."""
    noisy = step.noise.add_noise(
        step.latents_of(batch), sample_noise(batch.latents.shape[1:], batch.seeds), step.timesteps_of(batch)
    )
    torch.manual_seed(5)
    condition = step.model.condition(step.model.encode_text(batch.captions), batch.sizes)
    return step.model.denoise(noisy, step.timesteps_of(batch), condition)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_target_is_what_the_model_says_without_the_network(made, factors, name):
    step, _ = made(**NETWORKS[name])
    plain, marked = losses_of(step, batch_of()), losses_of(step, batch_of(0, 2))
    base = make_model()
    alone = TrainingStep(base, torch.nn.Module(), base.noise_process())
    own, said = answers(step, batch_of()), answers(alone, batch_of())
    expected = (own - said).square().mean(dim=(1, 2, 3)) * batch_of().weights
    torch.testing.assert_close(marked[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-9)
    assert expected.min() > 1e-6
    assert torch.equal(marked[1], plain[1]), "the others get what they would without it, dropouts included"
    assert (plain - marked)[[0, 2]].abs().min() > 1e-3


@pytest.mark.parametrize("name", ["lora", "takes the weights"])
def test_the_network_is_put_back_as_strong_as_its_dataset_wants_it(made, name):
    step, method = made(**{key: value for key, value in NETWORKS[name].items() if key != "network_dropout"})
    half = batch_of(0, 1, 2, network_multiplier=0.5)
    method.on_micro_step(half)
    before = answers(step, half)
    losses = losses_of(step, half)
    assert torch.equal(answers(step, half), before)
    assert (method.multiplier, step.trained.multiplier) == (0.5, 0.5)
    assert all(module.training for module in step.trained.modules())
    full, _ = made(**{key: value for key, value in NETWORKS[name].items() if key != "network_dropout"})
    assert (losses < losses_of(full, batch_of(0, 1, 2))).all()


def test_only_marked_samples_are_predicted_once_more(made, monkeypatch):
    step, _ = made(**NETWORKS["lora"])
    sizes, denoise = [], step.model.denoise
    monkeypatch.setattr(
        step.model, "denoise", lambda noisy, *others: (sizes.append(len(noisy)), denoise(noisy, *others))[1]
    )
    for marked in ((), (1,), (0, 1, 2)):
        losses_of(step, batch_of(*marked))
    assert sizes == [3, 1, 3, 3, 3]


def test_gradients_pass_the_network_alone_and_with_checkpoints_too(made):
    gradients = []
    for checkpointing in (False, True):
        step, _ = made(network_module="networks.lora")
        if checkpointing:
            step.model.enable_gradient_checkpointing(text_encoders=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses_of(step, batch_of(0, 1, 2)).sum().backward()
        gradients.append([parameter.grad for parameter in step.trained.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(map(torch.equal, *gradients))


@pytest.mark.slow
def test_compiled_blocks_know_the_difference(made):
    plain, _ = made(network_module="networks.lora")
    compiled, _ = made(network_module="networks.lora")
    try:
        compile_blocks(compiled.model.unet.mid_block.attentions, "eager")
        for marked in ((0, 2), (), (1,)):
            found = losses_of(compiled, batch_of(*marked))
            torch.testing.assert_close(found, losses_of(plain, batch_of(*marked)), rtol=1e-5, atol=1e-8)
            found.sum().backward()
    finally:
        torch._dynamo.reset()


def test_what_is_preserved_says_nothing_of_which_timesteps_are_hard(made):
    step, _ = made(timesteps="loss_aware", network_module="networks.lora")
    losses_of(step, batch_of(0, 2))
    assert step.objective.timesteps.values[1].sum() == 1


# whole runs


@pytest.fixture
def described(tmp_path) -> Callable[..., Path]:
    """`described(attribute)`: a dataset file with a folder as usual, and another with this attribute."""

    def make(attribute: object = True) -> Path:
        folders = [draw_pictures(tmp_path / name, count) for name, count in (("thing", 3), ("class", 4))]
        subsets = [{"image_dir": str(folder), "caption_extension": ".txt"} for folder in folders]
        if attribute is not None:
            subsets[1]["custom_attributes"] = {PRESERVES: attribute}
        file = tmp_path / "data.json"
        file.write_text(json.dumps({"datasets": [{"resolution": 32, "batch_size": 1, "subsets": subsets}]}))
        return file

    return make


@pytest.fixture
def run(train, flags, tmp_path):
    """`run(name, data, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, data: Path, **changes: object) -> Path:
        common = {"train_data_dir": None, "dataset_config": data, "caption_extension": None, "train_batch_size": None}
        train(flags(tmp_path / name, **common | changes))
        return tmp_path / name / "run.safetensors"

    return start


def test_it_is_off_unless_it_is_true(run, described):
    usual, off, on = run("usual", described(None)), run("off", described(False)), run("on", described(True))
    assert stored(usual) == stored(off)
    assert largest_difference(usual, on) > 1e-3


def test_cached_outputs_of_the_text_encoder_do(run, described, tmp_path):
    files, data = [], described()
    for name, cached in (("asked", None), ("cached", True)):
        changes = {"network_train_unet_only": True, "cache_text_encoder_outputs": cached, "network_dropout": 0.2}
        files.append(run(name, data, **changes, **PROPORTIONAL))
    assert_equal_to_rounding(*files)


def test_a_fresh_network_leaves_nothing_to_preserve_and_the_log_says_so(run, described, tmp_path):
    """Whose losses are 0 until it does something."""
    data = json.loads(described().read_text())
    data["datasets"][0]["subsets"].pop(0)
    (tmp_path / "class.json").write_text(json.dumps(data))
    run("out", tmp_path / "class.json", logging_dir=tmp_path / "log", max_train_steps=2)
    assert list(scalars(read_log(tmp_path / "log"), "loss/current").values()) == [0, 0]


def test_two_processes_train_what_one_does_with_two_micro_batches(run, described, flags, fork_server, tmp_path):
    """In some steps one of the processes alone has a sample to preserve."""
    data = described()
    common = {"train_data_dir": None, "dataset_config": data, "caption_extension": None, "train_batch_size": None}
    common |= {"max_train_steps": 3, **PROPORTIONAL}
    ended = fork_server.run(flags(tmp_path / "two", **common), processes=2, how=("impatient", "telling"))
    assert ended.status == 0, ended.said
    alone = run("one", data, gradient_accumulation_steps=2, **common)
    assert_equal_to_rounding(tmp_path / "two" / "run.safetensors", alone)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("train_db", {"network_module": None}),
        ("train_textual_inversion", {"network_module": None, "token_string": "sks"}),
    ],
)
def test_scripts_without_a_network_refuse_it(train, flags, described, tmp_path, capsys, script, changes):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, train_data_dir=None, dataset_config=described(), **changes), script=script)
    said = capsys.readouterr().err
    assert f"datasets[0].subsets[1].custom_attributes: {PRESERVES} needs a network beside the model" in said


@pytest.mark.parametrize("value", ["yes", "true", 1])
def test_nothing_but_true_and_false_will_do(train, flags, described, tmp_path, capsys, value):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, train_data_dir=None, dataset_config=described(value)))
    assert f"must have true or false, without quotes, as {PRESERVES}" in capsys.readouterr().err


def test_fsdp_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preservation.engines, "engine", lambda accelerator: "fsdp")
    check_engine([dataset(subset(tmp_path))], None)
    with pytest.raises(UserError, match=f"{PRESERVES} does not work under FSDP"):
        check_engine([dataset(subset(tmp_path, custom_attributes={PRESERVES: True}))], None)
