"""Steps in parts, and trained weights in half precision: what the optimizer sees, scaled losses, whole runs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, Lion8bit
from dadaptation import DAdaptAdam
from lion_pytorch import Lion
from prodigyopt import Prodigy
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import nn
from transformers.optimization import Adafactor

from library.errors import UserError
from library.options import MemoryOptions, PrecisionOptions
from library.training.methods.base import ParameterGroup
from library.training.optimization import stepper as steppers
from library.training.optimization.movement import Movement
from library.training.optimization.parts import Parts, can_be_split, divide
from library.training.optimization.rounding import Rounding
from library.training.optimization.stepper import HalfStepper
from tests.tiny import read_log, scalars, stored

SPLITTABLE = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AdamW8bit": lambda groups: AdamW8bit(groups, lr=0.01),
    "Lion8bit": lambda groups: Lion8bit(groups, lr=0.01),
    "Adafactor": lambda groups: Adafactor(groups, lr=None, relative_step=True, warmup_init=True),
    "Lion": lambda groups: Lion(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "AdamWScheduleFree": lambda groups: AdamWScheduleFree(groups, lr=0.01, warmup_steps=2, weight_decay=0.1),
    "SGDScheduleFree": lambda groups: SGDScheduleFree(groups, lr=0.01, warmup_steps=2),
    "RAdamScheduleFree": lambda groups: RAdamScheduleFree(groups, lr=0.01),
}


class Run:
    """An optimizer of two groups; the last parameter never has a gradient, the one before only in two steps."""

    def __init__(self, make, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        shapes = ((64, 80), (7,), (3, 4), (5,), (2, 2))
        self.parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        self.optimizer = make([{"params": self.parameters[:2]}, {"params": self.parameters[2:]}])
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def fill(self, step: int) -> None:
        for number, parameter in enumerate(self.parameters[:-1]):
            if number < 3 or step in (1, 6):
                generator = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def everything(self) -> list[object]:
        return [[parameter.detach().clone() for parameter in self.parameters], plain(self.optimizer.state_dict())]


def plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return (value.dtype, value.double().tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", SPLITTABLE)
def test_a_step_in_parts_is_the_whole_step(name):
    whole, parted = Run(SPLITTABLE[name]), Run(SPLITTABLE[name])
    assert can_be_split(type(whole.optimizer))
    parts = Parts(parted.optimizer, Rounding(0))
    for step in range(7):  # the first ones of RAdam move nothing
        for run in (whole, parted):
            run.fill(step)
        whole.optimizer.step()
        whole.optimizer.zero_grad()
        for members in ([3, 0], [1], [4], [2]):
            parts.take([parted.parameters[member] for member in members], step)
        parts.end()
        assert all(parameter.grad is None for parameter in parted.parameters)
    for ours, theirs in zip(parted.parameters, whole.parameters, strict=True):
        assert torch.equal(ours, theirs)
    assert plain(parted.optimizer.state_dict()) == plain(whole.optimizer.state_dict())
    assert not torch.equal(whole.parameters[3], Run(SPLITTABLE[name]).parameters[3])


def test_a_step_without_any_gradient_counts():
    run = Run(SPLITTABLE["AdamWScheduleFree"])
    Parts(run.optimizer, Rounding(0)).end()
    assert [group["k"] for group in run.optimizer.param_groups] == [1, 1]
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [2, 3]


def test_a_part_is_stepped_in_its_own_groups_alone():
    """Going through many groups for each of many parameters takes time. The step counts in all."""
    run, shown = Run(SPLITTABLE["AdamWScheduleFree"]), []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: shown.append(list(optimizer.param_groups)))
    groups, before = run.optimizer.param_groups, [set(group) for group in run.optimizer.param_groups]
    parts = Parts(run.optimizer, Rounding(0))
    for step in range(2):
        run.fill(step)
        for parameter in run.parameters[:2]:
            parts.take([parameter], step)
        parts.end()
    assert shown == [[groups[0]], [groups[0]], [groups[1]]] * 2
    assert [group["k"] for group in groups] == [2, 2]
    assert run.optimizer.param_groups is groups
    assert [set(group) for group in groups] == before


@pytest.mark.parametrize("kind", [Prodigy, DAdaptAdam, torch.optim.LBFGS, type("Own", (torch.optim.Optimizer,), {})])
def test_what_may_look_at_all_weights_is_not_split(kind):
    assert not can_be_split(kind)


def test_a_step_in_parts_is_watched_as_one():
    run = Run(SPLITTABLE["AdamW"])
    groups = [ParameterGroup(name, [], 0.01) for name in ("first", "second")]
    movement = Movement(groups, run.optimizer, step=lambda: step)
    parts = Parts(run.optimizer, Rounding(0))
    for step in range(2):
        run.fill(step)
        largest = max(float(parameter.grad.abs().max()) for parameter in run.parameters[:2])
        for parameter in run.parameters:
            parts.take([parameter], step)
        parts.end()
    assert (movement.taken, movement.steps) == (2, [2, 2])
    assert float(movement.largest[0]) >= largest > 0


def test_parts_are_bounded():
    parameters = [nn.Parameter(torch.empty(size)) for size in (5, 5, 20, 1, 4, 5)]
    sizes = [[one.numel() for one in part] for part in divide(parameters, 10)]
    assert sizes == [[5, 5], [20], [1, 4, 5]]
    assert len(divide(parameters, None)) == 1


@pytest.mark.parametrize("name", [*SPLITTABLE, "Prodigy"])
def test_what_is_kept_of_half_precision_is_as_fine_as_of_float32(name):
    """Where rounding is taken away, weights and state are those of a run in float32."""

    def exactly(target, exact, step, parameter):
        exacts[parameter] = exact.clone()

    make = {**SPLITTABLE, "Prodigy": lambda groups: Prodigy(groups, lr=1.0)}[name]
    half, single, exacts = Run(make, torch.bfloat16), Run(make), {}
    parts = Parts(half.optimizer, exactly)
    for ours, theirs in zip(half.parameters, single.parameters, strict=True):
        theirs.data.copy_(ours)
    half.fill(1)
    for ours, theirs in zip(half.parameters, single.parameters, strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.float() * 0.5
    single.optimizer.step()
    for part in parts.divided():
        parts.take(part, 1, torch.tensor(0.5))
    parts.end()
    assert len(exacts) == 4
    for number, exact in exacts.items():
        assert torch.equal(exact, single.parameters[number])
    assert plain(half.optimizer.state_dict()) == plain(single.optimizer.state_dict())


# --- fp16: scaled losses ---


class Scaled:
    """A HalfStepper around one fp16 parameter, with torch's GradScaler as it is on a GPU."""

    def __init__(self, clip_norm: float | None = None):
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
        accelerator = SimpleNamespace(scaler=self.scaler)
        prepared = SimpleNamespace(
            optimizer=optimizer, param_groups=optimizer.param_groups, zero_grad=optimizer.zero_grad
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        self.stepper = HalfStepper(
            accelerator, None, prepared, scheduler, [ParameterGroup("all", [self.weight], 1.0)], clip_norm, seed=0
        )

    def step(self, gradient: float) -> steppers.StepInfo:
        self.scaler.scale((self.weight.float() * gradient).sum()).backward()
        return self.stepper.step()


def test_gradients_too_small_for_fp16_move_the_weights():
    run = Scaled()
    run.weight.data.fill_(2.0**-20)
    info = run.step(2.0**-22)
    assert not info.skipped
    assert info.gradient_norm.item() == pytest.approx(2.0**-21)
    assert torch.allclose(run.weight.float(), torch.tensor(2.0**-20 - 2.0**-22), atol=2.0**-24, rtol=0)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved():
    run = Scaled()
    info = run.step(8.0)
    assert info.skipped
    assert not info.gradient_norm.isfinite()
    assert run.weight.eq(0).all()
    assert run.weight.grad is None
    assert run.scaler.get_scale() == 2.0**13
    saved = copy.deepcopy(run.scaler.state_dict())
    assert not run.step(1.0).skipped
    assert run.weight.eq(-1).all()
    run.step(0.0)
    run.step(0.0)
    assert run.scaler.get_scale() == 2.0**14  # grown after three steps
    other = Scaled()
    other.scaler.load_state_dict(saved)
    other.step(1.0)
    assert other.scaler.state_dict() == {**saved, "_growth_tracker": 1}


def test_unscaled_gradients_are_clipped():
    run = Scaled(clip_norm=1.0)
    info = run.step(3.0)
    assert info.gradient_norm.item() == pytest.approx(6.0)
    assert torch.allclose(run.weight.float(), torch.tensor(-0.5), atol=1e-3)


# --- whole runs ---

BF16 = {"mixed_precision": "bf16", "save_precision": "float"}


def test_small_steps_of_a_bf16_run_follow_those_in_float32(train, flags, tmp_path, monkeypatch):
    """Far below the rounding of bf16, the weights of the down factors move as far on average; with plain rounding most
    of them do not move at all.
    """
    changes = {**BF16, "learning_rate": 2e-5, "optimizer_args": "weight_decay=0", "max_train_steps": 8}
    rounding = {"stochastic": Rounding.__call__, "plain": lambda self, target, exact, *place: target.copy_(exact)}
    train(flags(tmp_path / "single", **changes))
    for name, rule in rounding.items():
        monkeypatch.setattr(Rounding, "__call__", rule)
        train(flags(tmp_path / name, **changes, full_bf16=True))
    train(flags(tmp_path / "still", **changes | {"learning_rate": 1e-30, "max_train_steps": 1}))
    files = {name: load_file(tmp_path / name / "run.safetensors") for name in ("still", "single", *rounding)}
    downs = [key for key in files["still"] if "lora_down" in key]

    def way(name: str) -> torch.Tensor:
        start = torch.cat([files["still"][key].flatten() for key in downs])
        start = start if name == "single" else start.bfloat16().float()
        return torch.cat([files[name][key].flatten() for key in downs]) - start

    aim = way("single")
    along = {name: float(way(name) @ aim / (aim @ aim)) for name in rounding}
    assert along["stochastic"] == pytest.approx(1, abs=0.1)
    assert along["plain"] < 0.5


@pytest.mark.parametrize(
    "kind",
    [
        {
            "optimizer_type": "AdamWScheduleFree",
            "ema": True,
            "gradient_accumulation_steps": 2,
        },
        pytest.param({"optimizer_type": "Prodigy", "learning_rate": 1}, marks=pytest.mark.slow),
        pytest.param({"optimizer_type": "AdamW8bit", "network_dim": 64}, marks=pytest.mark.slow),
    ],
    ids=["schedule free and more", "Prodigy", "AdamW8bit"],
)
def test_a_run_in_bf16_goes_on_and_is_rehearsed_without_a_trace(kind, train, flags, tmp_path):
    changes = {**BF16, "full_bf16": True, "save_state_on_train_end": True, **kind}
    train(flags(tmp_path / "whole", **changes))
    changes["no_rehearsal"] = None
    train(flags(tmp_path / "broken", **changes | {"max_train_steps": 2}))
    train(flags(tmp_path / "broken", **changes, resume="latest"))
    for name in ("run.safetensors", "run-state/trained.safetensors", "run-state/objects.safetensors"):
        assert stored(tmp_path / "broken" / name) == stored(tmp_path / "whole" / name), name
    state = load_file(tmp_path / "whole" / "run-state" / "trained.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if "alpha" not in key} == {torch.bfloat16}
    objects = load_file(tmp_path / "whole" / "run-state" / "objects.safetensors")
    assert torch.bfloat16 not in {tensor.dtype for tensor in objects.values()}


def test_fp16_on_a_cpu_is_a_run_in_bf16(train, flags, tmp_path, capsys):
    train(flags(tmp_path / "fp16", mixed_precision="fp16", full_fp16=True, max_train_steps=2))
    assert capsys.readouterr().err.count("training in bf16 on this CPU") == 1
    train(flags(tmp_path / "bf16", mixed_precision="bf16", full_bf16=True, max_train_steps=2))
    assert stored(tmp_path / "fp16" / "run.safetensors") == stored(tmp_path / "bf16" / "run.safetensors")


def test_the_norm_is_logged_before_clipping(train, flags, tmp_path):
    norms = []
    for limit in (0, 1e-3):
        folder = tmp_path / str(limit)
        train(flags(folder, max_grad_norm=limit, logging_dir=folder / "logs", max_train_steps=1))
        norms.append(scalars(read_log(folder / "logs"), "gradient_norm")[1])
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize(
    ("group", "values", "sentence"),
    [
        (PrecisionOptions, {"full_bf16": True}, "--full_bf16 needs --mixed_precision bf16: add that, or drop"),
        (PrecisionOptions, {"full_fp16": True, "mixed_precision": "bf16"}, "--full_fp16 needs --mixed_precision fp16"),
        (PrecisionOptions, {"full_fp16": True, "full_bf16": True}, "weights have one format, drop one of them"),
        (MemoryOptions, {"fused_backward_pass": True, "fused_optimizer_groups": 3}, "drop one of them$"),
    ],
)
def test_contradictions_are_refused(group, values, sentence):
    with pytest.raises(UserError, match=sentence):
        group(**values)
