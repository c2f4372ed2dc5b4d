"""Runs that go on in the course of their learning rate, and what is drawn of it."""

from pathlib import Path

import pytest
import torch

from library.models.files.checkpoint import open_weights
from library.options import SchedulerOptions, options_of
from library.training.optimization.courses import sample
from library.training.optimization.schedulers import planned
from library.training.resuming.packing import pack
from tests.courses import CLASSES, NAMED, Run, options
from tests.tiny import read_logs, scalars, stored

# going on


@pytest.mark.parametrize("chosen", [*NAMED, *CLASSES], ids=lambda chosen: chosen.name)
def test_an_interrupted_run_ends_as_one_without_a_break(chosen):
    whole, broken = Run(chosen, 10).go(10), Run(chosen, 10).go(4)
    resumed = broken.resumed().go(6)
    assert broken.rates + resumed.rates == whole.rates
    assert all(map(torch.equal, whole.weights, resumed.weights))
    assert pack(whole.scheduler.state_dict(), {}) == pack(resumed.scheduler.state_dict(), {})
    groups = [
        [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
        for run in (whole, resumed)
    ]
    assert groups[0] == groups[1]  # momentum, too, where the scheduler changes it


@pytest.mark.parametrize(
    "chosen",
    [one for one in (*NAMED, *CLASSES) if one.name in ("cosine", "polynomial", "OneCycleLR", "CyclicLR")],
    ids=lambda chosen: chosen.name,
)
def test_a_longer_run_has_the_curve_that_it_would_have_had(chosen):
    longer = Run(chosen, 20).go(20)
    resumed = Run(chosen, 10).go(4).resumed(total=20).go(16)
    assert resumed.rates == longer.rates[4:]


# whole runs


@pytest.fixture
def saying(train, flags, tmp_path, capsys):
    """`saying(name, **changes)` trains into a folder of this name and returns what was said."""

    def run(name: str, **changes: object) -> str:
        capsys.readouterr()
        train(flags(tmp_path / name, logging_dir=tmp_path / name / "logs", **changes))
        return capsys.readouterr().err

    return run


def pictured(folder: Path) -> list[int]:
    """The steps at which the planned rates were drawn."""
    return [event.step for event in read_logs(folder / "logs").Images("learning_rate")]


LENGTH = {"max_train_steps": 4, "save_every_n_steps": 2, "save_state": True}


QUICK = ("cosine", "CosineAnnealingWarmRestarts")
WHOLE = [(chosen, "AdamW") for chosen in (*NAMED, *CLASSES)] + [(options(lr_scheduler="adafactor"), "AdaFactor")]


@pytest.mark.parametrize(
    ("chosen", "optimizer"),
    [
        pytest.param(*pair, id=pair[0].name, marks=[] if pair[0].name.endswith(QUICK) else pytest.mark.slow)
        for pair in WHOLE
    ],
)
def test_a_whole_run_goes_on_exactly_and_logs_its_rates(saying, tmp_path, chosen, optimizer):
    course = {option.name: getattr(chosen, option.name) for option in options_of(SchedulerOptions)} | LENGTH
    course = {name: value for name, value in course.items() if value} | {"optimizer_type": optimizer}
    saying("whole", **course)
    saying("broken", **course, resume=tmp_path / "whole" / "run-step00000002-state")
    assert stored(tmp_path / "broken" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")
    whole, broken = (scalars(read_logs(tmp_path / name / "logs"), "lr/unet") for name in ("whole", "broken"))
    assert list(whole) == [1, 2, 3, 4]
    assert broken == {step: whole[step] for step in (3, 4)}
    if optimizer == "AdamW":
        ahead = sample(planned(chosen, torch.optim.AdamW([torch.zeros(1)]), [0.01], 4), 4, 4)
        assert list(whole.values()) == pytest.approx([rates[0] for rates in ahead.values()])


def test_a_class_that_keeps_rates_of_its_own_goes_on_exactly_and_with_new_ones(saying, tmp_path):
    course = {"lr_scheduler_type": "OneCycleLR", "unet_lr": 0.01, "text_encoder_lr": 0.002, **LENGTH}
    saying("whole", **course)
    state = tmp_path / "whole" / "run-step00000002-state"
    message = saying("broken", **course, resume=state)
    assert "learning rate goes on" not in message
    assert " learns at " not in message
    assert stored(tmp_path / "broken" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")
    assert pictured(tmp_path / "whole") == [0]
    with open_weights(tmp_path / "whole" / "run.safetensors") as file:
        assert file.metadata["ss_lr_scheduler"] == "OneCycleLR"
    message = saying("new", **course | {"unet_lr": 0.1}, resume_new_learning_rate=True, resume=state)
    assert "unet learns at 0.1 from here on, and did at 0.01" in message
    assert pictured(tmp_path / "new") == [2]
    old, new = (scalars(read_logs(tmp_path / name / "logs"), "lr/unet") for name in ("whole", "new"))
    assert new == pytest.approx({step: 10 * old[step] for step in (3, 4)})


def test_a_longer_run_draws_its_curve_again(saying, tmp_path):
    falling = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "save_state": True}
    saying("a", **falling, max_train_steps=2)
    message = saying("a", **falling, max_train_steps=4, resume="latest")
    assert "one of 4 steps would have had" not in message  # so far it is the warm-up and the height
    assert pictured(tmp_path / "a") == [0, 2]
    saying("b", **falling, max_train_steps=6, resume=tmp_path / "a" / "run-state")  # with a log of its own
    assert pictured(tmp_path / "b") == [4]
