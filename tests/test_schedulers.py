"""Courses of the learning rate: optimization/schedulers.py and what follows it, their plan, going on in them."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.errors import UserError
from library.options import SchedulerOptions, options_of
from library.options.optimizer import OptimizerOptions
from library.options.scheduler import LR_SCHEDULERS
from library.training.methods.base import ParameterGroup
from library.training.optimization import courses, schedulers
from library.training.optimization.courses import course, sample
from library.training.optimization.optimizers import make_optimizer
from library.training.optimization.planned_rates import rate_chart
from library.training.optimization.schedulers import check_length, check_scheduler, make_scheduler, planned
from tests.courses import CLASSES, NAMED, RATES, Run, options

GOLDEN = json.loads((Path(__file__).parent / "data/golden/lr_schedules.json").read_text())
OPTIMIZER = OptimizerOptions()


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the user was told."""
    messages = []
    for speaker in ("notice", "warn"):
        monkeypatch.setattr(schedulers, speaker, messages.append)
    return messages


# courses by name


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: " ".join(case["flags"]))
def test_courses_are_those_of_the_table(case):
    words = dict(zip(*[iter(case["flags"])] * 2, strict=True))
    read = {option.name: option.from_text for option in options_of(SchedulerOptions)}
    chosen = SchedulerOptions(**{flag[2:]: read[flag[2:]](text) for flag, text in words.items()})
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, (1.0, 1e-4), strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make_scheduler(chosen, optimizer, case["max_train_steps"])
    rates = []
    for _ in case["rates"]:
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    one, other = zip(*rates, strict=True)
    assert one == pytest.approx(case["rates"], abs=1e-8)
    assert other == pytest.approx([rate * 1e-4 for rate in case["rates"]], abs=2e-7)  # polynomial ends at 1e-7


def test_every_course_is_there_and_has_no_surprise_at_its_end():
    """Warm-ups that leave nothing, rates below the lowest one, rates of 0."""
    assert {one.lr_scheduler for one in NAMED} == LR_SCHEDULERS.keys() - {"adafactor"}
    for chosen in NAMED:
        for total in (1, 3, 10):
            for rate in (0.0, 1e-9, 0.01):
                ahead = planned(chosen, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), [rate], total)
                found = [rates[0] for rates in itertools.islice(course(ahead), total + 2)]
                assert all(0 <= one <= rate for one in found), (chosen.name, total, rate)


def test_further_arguments_of_courses():
    def rates(total: int, **values: object) -> list[float]:
        ahead = planned(options(**values), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), [1.0], total)
        return [values[0] for values in itertools.islice(course(ahead), total)]

    assert rates(4, lr_scheduler="polynomial", args=("lr_end=0.2",)) == pytest.approx([1, 0.8, 0.6, 0.4])
    decay = {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 4}
    assert rates(6, **decay, args=("decay_type=linear",)) == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(4, lr_scheduler="piecewise_constant", args=("step_rules=1:1, 0.5:3, 0.1",)) == [1, 0.5, 0.5, 0.1]
    assert rates(5, lr_scheduler="piecewise_constant", args=('step_rules="2:2,1"',)) == [2, 2, 1, 1, 1]
    assert rates(3, lr_scheduler="cosine_with_min_lr", args=("min_lr=0.25",))[1] == pytest.approx(0.25 + 0.75 * 0.75)
    assert rates(2, lr_scheduler="inverse_sqrt", timescale=1)[1] == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr_scheduler": "cosinus"}, "cosinus is not available, choose constant, .* did you mean cosine"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio, such as 0.1, .* give one of them"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.1, "args": ("min_lr=1e-6",)},
            "give only one of them",
        ),
        ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant needs --lr_scheduler_args step_rules="),
        ({"lr_scheduler": "piecewise_constant", "args": ("step_rules=1:x,2",)}, "needs .* step_rules="),
        ({"lr_scheduler": "polynomial", "args": ("lr_ende=0",)}, "takes no lr_ende, did you mean lr_end"),
        (
            {"lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 1.5},
            "--lr_scheduler_min_lr_ratio: 1.5 is more than 1",
        ),
        ({"type": "..foo"}, "--lr_scheduler_type: ..foo is written neither as a class of"),
        ({"args": ("gamma",)}, "'gamma' is not written as name=value"),
    ],
)
def test_wrong_options_are_refused_before_torch(values, sentence):
    with pytest.raises(UserError, match=sentence):
        options(**values)


# classes by name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"type": "CosineAnnealing"},
            "torch.optim.lr_scheduler has no CosineAnnealing, did you mean CosineAnnealingLR",
        ),
        ({"type": "not_there.Scheduler"}, "there is no module not_there: look at the spelling"),
        ({"type": "torch.optim.AdamW"}, "torch.optim.AdamW is no scheduler of PyTorch"),
        ({"type": "ReduceLROnPlateau"}, "ReduceLROnPlateau follows metrics, which no step measures"),
        ({"type": "StepLR"}, r"--lr_scheduler_args: StepLR needs step_size \(it takes step_size, gamma\)"),
        ({"type": "StepLR", "args": ("step_sice=3",)}, r"takes no step_sice, did you mean step_size\? \(it takes"),
        ({"type": "StepLR", "args": ("step_size=3", "last_epoch=5")}, "StepLR takes no last_epoch"),
        ({"type": "CosineAnnealingWarmRestarts", "args": ("T_0=-1",)}, "refuses them: Expected positive integer T_0"),
        ({"type": "LambdaLR"}, "LambdaLR is made of functions or other schedulers"),
    ],
)
def test_wrong_classes_and_arguments_are_named_before_anything_is_loaded(values, sentence):
    with pytest.raises(UserError, match=sentence):
        check_scheduler(options(**values), OPTIMIZER)


def test_a_module_that_fails_at_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "their_failing_rates.py").write_text("raise RuntimeError('no\\nway')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^--lr_scheduler_type their_failing_rates\.Own: the installed .* \(no way\)"):
        check_scheduler(options(type="their_failing_rates.Own"), OPTIMIZER)


def test_an_optimizer_that_takes_matrices_alone_is_tried_with_one():
    for check in (check_scheduler, lambda *arguments: check_length(*arguments, 10)):
        check(options(lr_scheduler="cosine"), OptimizerOptions(optimizer_type="Muon"))


def test_a_class_of_somebody_elses(monkeypatch, tmp_path):
    (tmp_path / "their_rates.py").write_text(
        "from torch.optim.lr_scheduler import LRScheduler\n"
        "class Halved(LRScheduler):\n"
        "    def __init__(self, optimizer, every=2, last_epoch=-1):\n"
        "        self.every = every\n"
        "        super().__init__(optimizer, last_epoch)\n"
        "    def get_lr(self):\n"
        "        return [group['lr'] * (0.5 if self.last_epoch % self.every == 1 else 1) for group in "
        "self.optimizer.param_groups]\n"
        "class Strange(Halved):\n"
        "    def __init__(self, optimizer, **others):\n"
        "        self.rule = lambda step: step\n"
        "        super().__init__(optimizer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "their_rates", None)
    del sys.modules["their_rates"]
    chosen = options(type="their_rates.Halved", args=("every=3",))
    check_scheduler(chosen, OPTIMIZER)
    whole = Run(chosen, 8).go(8)
    assert whole.rates[0] == list(RATES)
    assert whole.rates[1][0] == RATES[0] / 2
    broken = Run(chosen, 8).go(5)
    assert broken.rates + broken.resumed().go(3).rates == whole.rates
    with pytest.raises(UserError, match=r"Strange\.rule holds a function, which no state can keep, and a run"):
        check_scheduler(options(type="their_rates.Strange"), OPTIMIZER)


def test_lengths_and_rates_come_from_the_run(told):
    run = Run(options(type="OneCycleLR", args=("pct_start=0.5",)), 8).go(8)
    height = [max(rates) for rates in zip(*run.rates, strict=True)]
    assert height == pytest.approx(RATES)
    assert run.rates[0] == pytest.approx([rate / 25 for rate in RATES])
    assert told == [
        "--lr_scheduler_type OneCycleLR takes total_steps from the steps of the run and max_lr from the learning "
        "rates, since --lr_scheduler_args does not say"
    ]
    given = Run(options(type="OneCycleLR", args=("total_steps=9", "max_lr=0.5")), 8)
    assert given.scheduler.total_steps == 9
    assert len(told) == 1


# what is said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, ""),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 4}, ""),
        ({"lr_warmup_steps": 4}, "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        (
            {"lr_scheduler": "linear", "power": 2, "num_cycles": 3, "args": ("a=1",)},
            "--lr_scheduler_args, --lr_scheduler_num_cycles, --lr_scheduler_power have no effect with --lr_scheduler "
            "linear",
        ),
        (
            {"lr_scheduler": "cosine", "type": "ExponentialLR", "args": ("gamma=0.9",), "lr_warmup_steps": 0.1},
            "--lr_scheduler, --lr_warmup_steps have no effect with --lr_scheduler_type ExponentialLR",
        ),
    ],
)
def test_flags_without_effect_are_named(values, sentence, told):
    check_scheduler(options(**values), OPTIMIZER)
    assert told == ([sentence] if sentence else [])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr_scheduler": "linear", "lr_warmup_steps": 10}, "10 steps of warm-up are as many as the run of 10 has"),
        ({"lr_warmup_steps": 10}, ""),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 9}, ""),
        ({"lr_scheduler": "warmup_stable_decay"}, "without --lr_decay_steps the rate stays high to the end"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 0.5, "lr_decay_steps": 6},
            "5 steps of warm-up and 6 of decay do not fit into the 10 of the run, so the rate jumps",
        ),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 0.5, "lr_decay_steps": 5}, ""),
    ],
)
def test_what_does_not_fit_into_the_run_is_said(values, sentence, told):
    check_length(options(**values), OPTIMIZER, 10)
    assert [sentence in one for one in told] == ([True] if sentence else [])


def test_a_scheduler_that_ends_before_the_run_is_refused():
    chosen = options(type="OneCycleLR", args=("total_steps=8", "max_lr=1"))
    check_length(chosen, OPTIMIZER, 8)
    with pytest.raises(UserError, match="OneCycleLR cannot go on after step 9 of 12: Tried to step 9 times"):
        check_length(chosen, OPTIMIZER, 12)


def test_a_run_without_a_rate_is_refused():
    chosen = options(lr_scheduler="piecewise_constant", args=("step_rules=0:100,1",))
    check_length(chosen, OPTIMIZER, 101)
    with pytest.raises(UserError, match="the learning rate is 0 from step 1 to the end"):
        check_length(chosen, OPTIMIZER, 100)


@pytest.mark.filterwarnings("error")
def test_a_first_step_that_is_skipped_is_no_news():
    """As when fp16 gradients overflow."""
    run = Run(options(lr_scheduler="linear"), 10)
    run.scheduler.step()
    assert run.scheduler.get_last_lr() == pytest.approx([0.9 * rate for rate in RATES])


# optimizers with a course of their own


def adafactor(chosen: SchedulerOptions, **settings: object) -> Run:
    return Run(chosen, 10, Adafactor, **settings)


def test_adafactor_finds_its_steps_and_the_rates_shown_are_those_it_takes(told):
    run = adafactor(options(lr_scheduler="cosine"), scale_parameter=False, warmup_init=True)
    assert "--lr_scheduler cosine has no effect: Adafactor finds the size of its steps itself" in told[0]
    for _ in range(3):
        run.go(1)
        taken = [
            Adafactor._get_lr(group, run.optimizer.state[group["params"][0]]) for group in run.optimizer.param_groups
        ]
        assert run.rates[-1] == [float(rate) for rate in taken]
    assert run.rates[0] != run.rates[2]
    del told[:]
    adafactor(SchedulerOptions())
    adafactor(SchedulerOptions("adafactor"), scale_parameter=False, warmup_init=True)
    assert told == []


def test_adafactor_without_its_own_steps_takes_any_course_but_its_own(told):
    own = {"relative_step": False, "scale_parameter": False}
    run = adafactor(options(lr_scheduler="linear"), **own).go(2)
    assert run.rates[1] == pytest.approx([0.9 * rate for rate in RATES])
    with pytest.raises(UserError, match="relative_step=True finds, which Adafactor is not"):
        adafactor(SchedulerOptions("adafactor"), **own)
    with pytest.raises(UserError, match="which AdamW is not"):
        check_scheduler(SchedulerOptions("adafactor"), OPTIMIZER)


def test_schedule_free_optimizers_have_a_constant_rate(told):
    chosen = OptimizerOptions(optimizer_type="AdamWScheduleFree")
    check_scheduler(options(lr_scheduler="cosine", lr_warmup_steps=5), chosen)
    assert "--lr_scheduler cosine has no effect: the average of AdamWScheduleFree takes the place" in told[0]
    optimizer = make_optimizer(chosen, [ParameterGroup("a", [nn.Parameter(torch.zeros(1))], 0.5)])
    scheduler = make_scheduler(options(lr_scheduler="cosine"), optimizer, 4)
    assert [rates for (rates,) in itertools.islice(course(scheduler), 4)] == [0.5] * 4


# the plan


def test_a_plan_is_what_the_run_takes_and_touches_nothing():
    for chosen in (*NAMED, *CLASSES):
        run = Run(chosen, 10).go(3)
        before = repr(run.optimizer.state_dict()), repr(run.scheduler.state_dict())
        found = sample(planned(chosen, run.optimizer, RATES, 10), 10, 1000)
        assert (repr(run.optimizer.state_dict()), repr(run.scheduler.state_dict())) == before
        assert list(found.values()) == run.go(7).rates, chosen.name
        few = sample(planned(chosen, run.optimizer, RATES, 10), 10, 4)
        assert few == {step: found[step] for step in (0, 3, 6, 9)}


def test_a_very_long_run_is_planned_at_once():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    found = sample(planned(options(lr_scheduler="linear"), optimizer, [1.0], 10**9), 10**9, 3)
    assert found == {0: [1.0], 500000000: [0.5], 10**9 - 1: [pytest.approx(1e-9)]}


def test_classes_are_walked_through_for_a_while_only(monkeypatch):
    monkeypatch.setattr(courses, "WALKED", 50)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    found = sample(planned(options(type="ExponentialLR", args=("gamma=0.9",)), optimizer, [1.0], 200), 200, 3)
    assert list(found) == [0, 24, 49]


def test_the_picture_has_a_line_for_each_course():
    colours = []
    for rates in ({1: [1.0, 1.0], 5: [0.0, 0.0]}, {1: [1.0, 0.5], 5: [0.0, 0.2]}, {3: [0.0, 0.0]}):
        picture = rate_chart(["text_encoder", "unet"], rates, "planned rates")
        colours.append({colour for _, colour in picture.getcolors(100000)} & {(66, 110, 180), (222, 128, 54)})
    assert [len(found) for found in colours] == [1, 2, 1]
