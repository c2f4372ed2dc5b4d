"""Learning rates over time."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import optimization as of_diffusers
from torch import nn
from torch.optim import lr_scheduler as of_torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import optimization as of_transformers

from library.console import notice, quiet_dependencies, warn
from library.errors import UserError
from library.options.optimizer import OptimizerOptions
from library.options.scheduler import LR_SCHEDULERS, SchedulerOptions
from library.training.optimization.arguments import literal, literal_keywords
from library.training.optimization.classes import import_class
from library.training.optimization.courses import WALKED, Spare, require_rates
from library.training.optimization.optimizers import finds_steps, probe_optimizer
from library.training.resuming.packing import pack

_LOWEST_OF_POLYNOMIAL = 1e-7
_GIVEN = ("last_epoch",)
# Arguments of classes that come from the run where nothing else is said.
_SOURCES = {"total_steps": "the steps of the run", "T_max": "the steps of the run", "max_lr": "the learning rates"}
_OF_OTHERS = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
_NOMINAL_STEPS = 1000

Curve = Callable[[int], float]  # step counted from 0 -> factor of the highest rate


def make_scheduler(options: SchedulerOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The course of the options over `total_steps` optimizer steps, from the rates that the optimizer's groups have;
    it steps once per optimizer step. Each group keeps its rate as `asked_rate`, since schedulers overwrite the others.

    UserError if the scheduler does not exist, refuses its arguments, or is not for this optimizer.
    """
    for group in optimizer.param_groups:
        group["asked_rate"] = group["lr"]
    return _build(settle(options, optimizer), optimizer, total_steps)


def settle(options: SchedulerOptions, optimizer: torch.optim.Optimizer) -> SchedulerOptions:
    """The options as the optimizer lets them be: some have a course of their own, which is said. UserError for the
    course of AdaFactor with another optimizer.
    """
    kind = type(optimizer).__name__
    if finds_steps(optimizer):
        if options.name not in ("constant", "adafactor"):
            notice(
                f"{options.spelling} has no effect: {kind} finds the size of its steps itself, unless "
                "--optimizer_args relative_step=False is given"
            )
        return SchedulerOptions("adafactor")
    if options.name == "adafactor":
        raise UserError(
            f"--lr_scheduler adafactor shows the rate that AdaFactor with relative_step=True finds, which {kind} is "
            "not: choose another, or --optimizer_type AdaFactor without relative_step=False"
        )
    if any("train_mode" in group for group in optimizer.param_groups):  # schedule-free
        warmup = "--lr_warmup_steps" if options.lr_warmup_steps else None
        if ignored := options.spelling if options.name != "constant" else warmup:
            own = "warmup_steps" in optimizer.defaults
            notice(
                f"{ignored} has no effect: the average of {kind} takes the place of a course"
                f"{', and its argument warmup_steps that of a warm-up' if own else ''}"
            )
        return SchedulerOptions()
    return options


def check_scheduler(options: SchedulerOptions, optimizing: OptimizerOptions) -> None:
    """UserError for an optimizer or scheduler that cannot be had, before anything is loaded; a notice of flags without
    effect.
    """
    probe = probe_optimizer(optimizing)
    scheduler = make_scheduler(options, probe, _NOMINAL_STEPS)
    try:
        pack(scheduler.state_dict(), {}, type(scheduler).__name__)
    except TypeError as problem:
        raise UserError(
            f"{options.spelling}: {problem}, and a run could not go on after a break: choose another"
        ) from None
    if (unheard := options.without_effect) and settle(options, probe) is options:
        verb = "has" if len(unheard) == 1 else "have"
        notice(f"{', '.join(unheard)} {verb} no effect with {options.spelling}")
    if any("relative_step" in group for group in probe.param_groups) and not finds_steps(probe):
        usual = [] if options.name == "constant_with_warmup" else ["--lr_scheduler constant_with_warmup"]
        usual += ["--max_grad_norm 0"] if optimizing.clip_norm else []
        if usual:
            notice(f"AdaFactor with relative_step=False is usually given {' and '.join(usual)}")


def check_length(options: SchedulerOptions, optimizing: OptimizerOptions, total_steps: int) -> None:
    """Say what is odd about the course in a run of that length. UserError if the scheduler ends before the run, or if
    its rates are all 0.
    """
    probe = probe_optimizer(optimizing)
    options = settle(options, probe)
    if options.lr_scheduler_type:
        _walk(options, probe, total_steps)
    require_rates(planned(options, probe, [1.0], total_steps), 0, total_steps)
    if options.lr_scheduler_type:
        return
    warmup = options.warmup_steps(total_steps) if options.warmup_heard else 0
    if warmup >= total_steps:
        warn(
            f"--lr_warmup_steps: {warmup} steps of warm-up are as many as the run of {total_steps} has, or more, so "
            "the learning rate never reaches its height"
        )
    if options.lr_scheduler == "warmup_stable_decay":
        decay = options.decay_steps(total_steps)
        if not decay:
            notice("--lr_scheduler warmup_stable_decay: without --lr_decay_steps the rate stays high to the end")
        elif warmup + decay > total_steps:
            warn(
                f"--lr_decay_steps: {warmup} steps of warm-up and {decay} of decay do not fit into the {total_steps} "
                "of the run, so the rate jumps where the decay begins"
            )


def _walk(options: SchedulerOptions, probe: torch.optim.Optimizer, total_steps: int) -> None:
    scheduler, done = _build(options, Spare(probe, [1.0]), total_steps), 0
    try:
        for done in range(1, min(total_steps, WALKED) + 1):  # noqa: B007
            scheduler.step()
    except Exception as problem:  # whatever somebody else's class makes of it
        raise UserError(f"{options.spelling} cannot go on after step {done} of {total_steps}: {problem}") from problem


def planned(
    options: SchedulerOptions, optimizer: torch.optim.Optimizer, rates: Sequence[float], total_steps: int
) -> LRScheduler:
    """The scheduler of a run at its first step, beside the optimizer, from these rates of its groups."""
    return _build(settle(options, optimizer), Spare(optimizer, rates), total_steps)


def _build(options: SchedulerOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    optimizer._opt_called = True  # or torch warns where an overflow skips the first step, whose rate counts as taken
    if options.lr_scheduler_type:
        return _of_class(options, optimizer, total_steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    curves = {rate: _curve(options, rate, total_steps) for rate in rates}
    return LambdaLR(optimizer, [curves[rate] for rate in rates])


def _curve(options: SchedulerOptions, rate: float, total_steps: int) -> Curve:
    """The course by name of a group with this highest rate: some have a lowest one that is a number."""
    name = options.lr_scheduler
    maker, keywords = _maker(options, rate or 1.0, total_steps)
    words = options.keywords if LR_SCHEDULERS[name].arguments and name != "piecewise_constant" else {}
    keywords |= {key: literal(text) for key, text in words.items()}
    try:
        made = maker(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate or 1.0), **keywords)
    except (TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"--lr_scheduler_args: {name} refuses them: {problem}") from problem
    return made.lr_lambdas[0]


def _maker(options: SchedulerOptions, rate: float, total_steps: int) -> tuple[Callable[..., LambdaLR], dict[str, Any]]:
    """The function behind a course by name, and what it is called with."""
    warmup = options.warmup_steps(total_steps)
    warm = {"num_warmup_steps": warmup}
    whole = warm | {"num_training_steps": total_steps}
    cycles = options.lr_scheduler_num_cycles
    lowest = options.lr_scheduler_min_lr_ratio
    decay = options.decay_steps(total_steps)
    makers: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_schedule", {}),
        "adafactor": ("constant_schedule", {}),  # whatever the rate: the optimizer does not look at it
        "constant_with_warmup": ("constant_schedule_with_warmup", warm),
        "linear": ("linear_schedule_with_warmup", whole),
        "cosine": ("cosine_schedule_with_warmup", whole),
        "cosine_with_restarts": ("cosine_with_hard_restarts_schedule_with_warmup", whole | {"num_cycles": cycles}),
        "cosine_with_min_lr": (
            "cosine_with_min_lr_schedule_with_warmup",
            whole | {"num_cycles": cycles / 2, "min_lr_rate": lowest},
        ),
        "polynomial": (
            "polynomial_decay_schedule_with_warmup",
            {
                **warm,
                "num_training_steps": max(total_steps, warmup + 1),  # it divides by the steps after the warm-up
                "power": options.lr_scheduler_power,
                "lr_end": _LOWEST_OF_POLYNOMIAL if rate > _LOWEST_OF_POLYNOMIAL else 0.0,
            },
        ),
        "inverse_sqrt": ("inverse_sqrt_schedule", warm | {"timescale": options.lr_scheduler_timescale}),
        "warmup_stable_decay": (
            "wsd_schedule",
            {
                **warm,
                "num_stable_steps": total_steps - warmup - decay,
                "num_decay_steps": decay,
                "min_lr_ratio": lowest or 0.0,
                "num_cycles": cycles / 2,
            },
        ),
        "piecewise_constant": ("piecewise_constant_schedule", {"step_rules": options.step_rules}),
    }
    name, keywords = makers[options.lr_scheduler]
    source = of_diffusers if options.lr_scheduler == "piecewise_constant" else of_transformers
    return getattr(source, f"get_{name}"), keywords


def _of_class(options: SchedulerOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    kind = scheduler_class(options.lr_scheduler_type)
    parameters, words = inspect.signature(kind).parameters, options.keywords
    rates = [group["lr"] for group in optimizer.param_groups]
    filled: dict[str, Any] = {}
    for name in ("total_steps", "T_max"):
        if name in parameters and parameters[name].default in (inspect.Parameter.empty, None) and "epochs" not in words:
            filled[name] = total_steps
    if "max_lr" in parameters and parameters["max_lr"].default is inspect.Parameter.empty:
        filled["max_lr"] = rates
    filled = {name: value for name, value in filled.items() if name not in words}
    keywords = filled | literal_keywords(kind, words, "--lr_scheduler_args", _GIVEN, filled)
    if filled:
        sources = [f"{name} from {_SOURCES[name]}" for name in filled]
        notice(f"{options.spelling} takes {' and '.join(sources)}, since --lr_scheduler_args does not say")
    try:
        with quiet_dependencies():
            return kind(optimizer, **keywords)
    except Exception as problem:  # whatever somebody else's class makes of them
        raise UserError(f"--lr_scheduler_args: {kind.__name__} refuses them: {problem}") from problem


def scheduler_class(name: str) -> type[LRScheduler]:
    """The class that --lr_scheduler_type names. UserError if there is none that works with nothing but steps."""
    module, _, own = name.rpartition(".")
    flag = f"--lr_scheduler_type {name}"
    if not module:
        own = next((one for one in vars(of_torch) if one.lower() == own.lower() and one[0].isupper()), own)
    if own in _OF_OTHERS:
        raise UserError(f"{flag} is made of functions or other schedulers, which no flag can give: choose another")
    kind = import_class(flag, module or of_torch.__name__, own)
    if not (isinstance(kind, type) and issubclass(kind, LRScheduler) and kind is not LRScheduler):
        raise UserError(f"{flag} is no scheduler of PyTorch")
    wants = [one.name for one in inspect.signature(kind.step).parameters.values() if one.default is one.empty]
    if wants != ["self"]:
        raise UserError(
            f"{flag} follows {' and '.join(wants[1:])}, which no step measures: choose one that follows the steps alone"
        )
    return kind
