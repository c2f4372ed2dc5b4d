"""Going on with a run: where it starts, and how everything gets back into its place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.console import notice, warn
from library.errors import UserError
from library.models.files.checkpoint import open_weights
from library.options.resume import ResumeOptions
from library.options.scheduler import SchedulerOptions
from library.training import engines, foreign_state, together
from library.training.differences import say_differences, what_does_not_fit
from library.training.optimizers import load_optimizer
from library.training.packing import check_shapes
from library.training.requests import RunEnded
from library.training.schedulers import make_scheduler
from library.training.state import Progress, TrainState, load_trained, read_objects
from library.training.states import ENGINE, LATEST, SUFFIX, TRAINED, StateFolder, read

if TYPE_CHECKING:
    from library.training.motion import Motion


def agree_on_state(found: StateFolder | None) -> StateFolder | None:
    """The state the first process has found, for all of them. UserError where a machine does not see it."""
    folder = together.first_says(found and found.folder)
    if folder is None or found is not None:
        return found
    state = read(folder) if folder.is_dir() else None
    if state is None:
        raise UserError(f"--resume: {folder} is not on this machine: share the folder, or copy it here")
    return state


def start(
    options: ResumeOptions, resumed: StateFolder | None, total_steps: int, steps_per_epoch: int, patience: int | None
) -> Progress:
    """Where the run begins: at its first step, after the state's last, or where a flag says. `patience` is that of
    --stop_after_no_improvement.

    UserError if no step is left, or RunEnded where --resume latest finds a finished run.
    """
    progress = Progress(total_steps, total_epochs=-(-total_steps // steps_per_epoch))
    for name, value in resumed.progress.items() if resumed else ():
        if name not in ("total_steps", "total_epochs", "stopped_by"):
            setattr(progress, name, value)
    first = options.first_step(steps_per_epoch)
    if resumed and first is None and _stays_stopped(resumed.progress, total_steps, patience):
        sentence = (
            f"nothing is left to train: {resumed.folder} is of step {resumed.step}, after which "
            f"--stop_after_no_improvement {patience} ended the run"
        )
        if options.resume == LATEST:
            raise RunEnded(f"{sentence}; another number there, or a larger --max_train_steps, lets it go on")
        raise UserError(f"{sentence}: give another number there, or raise --max_train_steps")
    if first is not None:
        if resumed and resumed.step and first != resumed.step:
            warn(f"{resumed.folder} is of step {resumed.step}, but a flag says that the run starts after step {first}")
        progress.step, progress.epoch = first, max(first - 1, 0) // steps_per_epoch + 1
        progress.epoch_ended = first > 0 and first % steps_per_epoch == 0
    if not progress.finished:
        return progress
    what = f"{resumed.folder} is of step {resumed.step}" if first is None else f"it starts after step {first}"
    sentence = f"nothing is left to train: {what}, and the run ends at step {total_steps}"
    if first is None and _lacks_its_end(resumed, total_steps):
        notice("all steps are done, and the run was stopped before its last files were written: they are written now")
        return progress
    if first is None and resumed.step == total_steps and options.resume == LATEST:
        raise RunEnded(f"{sentence}; --max_train_steps or --max_train_epochs extend it")
    raise UserError(f"{sentence}: raise --max_train_steps or --max_train_epochs")


def _stays_stopped(before: Mapping[str, Any], total_steps: int, patience: int | None) -> bool:
    """Whether a run ended early, and is not asked for more than it was then."""
    return (
        before.get("stopped_by") is not None
        and before["stopped_by"] == patience
        and (total_steps <= before["total_steps"])
    )


def _lacks_its_end(resumed: StateFolder, total_steps: int) -> bool:
    """Whether a state is that of the last step, but not the one that is written at the very end."""
    last = f"{resumed.facts.get('output_name')}{SUFFIX}"
    return resumed.ours and resumed.step == total_steps and resumed.folder.name != last


def restore_trained(resumed: StateFolder, state: TrainState) -> None:
    """Put the trained weights back, and what the engine keeps with them. UserError if they do not fit."""
    own = engines.spreads(state.accelerator)
    if own != (resumed.folder / ENGINE).is_dir():
        engine = resumed.facts.get("engine", "another engine")
        raise UserError(
            f"{resumed.folder} is of a run under {engine}: resume it in the same way, or start a new run from its last "
            "saved file"
        )
    if own:
        engines.load_engine(state.accelerator, resumed.folder / ENGINE)
        return
    try:
        (load_trained if resumed.ours else foreign_state.load_trained)(resumed.folder, state.step.trained)
    except ValueError as problem:
        raise _of_something_else(resumed, state.facts, problem) from None


def foresee(resumed: StateFolder, trained: nn.Module, now: Mapping[str, Any], step: int) -> None:
    """Say what going on with a state would mean, from names and shapes alone. UserError if it does not fit."""
    if (resumed.folder / TRAINED).is_file():
        with open_weights(resumed.folder / TRAINED) as file:
            shapes = {key: file.shape(key) for key in file.keys()}  # noqa: SIM118
        try:
            check_shapes(trained, shapes)
        except ValueError as problem:
            raise _of_something_else(resumed, now, problem) from None
    if resumed.ours:
        say_differences(resumed.facts, now, step)
    notice(f"it would go on after step {step} with {resumed.folder}")


def _of_something_else(resumed: StateFolder, now: Mapping[str, Any], problem: ValueError) -> UserError:
    """For a state that does not fit what is trained."""
    why = what_does_not_fit(resumed.facts, now, problem)
    return UserError(
        f"{resumed.folder} is the state of something else than what these flags train ({why}): resume with the flags "
        "that it was started with"
    )


def restore(
    resumed: StateFolder, state: TrainState, motion: "Motion", options: SchedulerOptions, *, new_rates: bool
) -> None:
    """Put everything else back. `new_rates`: the learning rates of the command line win over those of the state."""
    if resumed.ours:
        say_differences(resumed.facts, state.facts, state.progress.step)
        saved = read_objects(resumed)
    else:
        saved = foreign_state.objects(resumed.folder, state.facts["optimizer"], state.progress.step)
    if resumed.ours and resumed.facts.get("optimizer") != state.facts["optimizer"]:
        saved.pop("optimizer", None)
    _restore_optimizer(saved.pop("optimizer", None), resumed, state, motion)
    _restore_rates(motion, new_rates)
    restore_scheduler(motion.scheduler, saved.pop("scheduler", None), motion.optimizer, state.progress.step)
    _require_rates(motion.scheduler, state.progress)
    _say_if_curve_differs(resumed.progress, motion.scheduler, options, state.progress)
    for name, thing in state.objects.items():
        if name in saved:
            thing.load_state_dict(saved[name])
    notice(f"going on after step {state.progress.step} with {resumed.folder}")


def _restore_optimizer(saved: dict[str, Any] | None, resumed: StateFolder, state: TrainState, motion: "Motion") -> None:
    if saved is None:
        return
    try:
        load_optimizer(motion.optimizer, saved)
    except ValueError as problem:
        if resumed.ours:
            raise _of_something_else(resumed, state.facts, problem) from None
        warn(f"the optimizer starts anew, because the state's does not fit what is trained ({problem})")


def _restore_rates(motion: "Motion", new_rates: bool) -> None:
    """Choose between the learning rates of the state, which are in the optimizer by now, and those of the flags."""
    for number, (group, mine) in enumerate(zip(motion.optimizer.param_groups, motion.groups, strict=True)):
        old = group.setdefault("initial_lr", group["lr"])
        if old != mine.learning_rate and new_rates:
            notice(f"{mine.name} learns at {mine.learning_rate:g} from here on, and did at {old:g}")
            group["initial_lr"] = mine.learning_rate
        elif old != mine.learning_rate:
            warn(
                f"{mine.name} learns at {old:g} as before, not at {mine.learning_rate:g}: --resume_new_learning_rate "
                "lets new rates win"
            )
        motion.scheduler.base_lrs[number] = group["initial_lr"]


def restore_scheduler(
    scheduler: LRScheduler, saved: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Go on with the curve, from the scheduler's own highest rates, at the state's place in it, or after `step` if the
    state has none. A longer run has the curve that it would have had. Says so where that is not the state's rate.
    """
    base_rates = list(scheduler.base_lrs)
    if saved is None:
        scheduler.last_epoch = step
    else:
        scheduler.load_state_dict(dict(saved))
        scheduler.base_lrs = base_rates
    if not isinstance(scheduler, LambdaLR):
        return
    rates = _rates_at(scheduler, base_rates, scheduler.last_epoch)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    before = list(saved["_last_lr"]) if saved else []
    if before and before != _rates_at(scheduler, saved["base_lrs"], scheduler.last_epoch):
        shown = [", ".join(f"{rate:.3g}" for rate in values) for values in (rates, before)]
        notice(f"the learning rate goes on at {shown[0]}, not {shown[1]}, as the curve of these flags says")


def _require_rates(scheduler: LRScheduler, progress: Progress) -> None:
    """UserError if the rest of the curve is zero."""
    if not isinstance(scheduler, LambdaLR) or progress.finished:
        return
    place, left = scheduler.last_epoch, progress.total_steps - progress.step
    if not any(any(_rates_at(scheduler, scheduler.base_lrs, place + step)) for step in range(left)):
        raise UserError(
            f"nothing is left to learn: the learning rate is 0 from step {progress.step + 1} to the end, raise "
            "--max_train_steps or choose another --lr_scheduler"
        )


def _say_if_curve_differs(
    before: Mapping[str, Any], scheduler: LRScheduler, options: SchedulerOptions, progress: Progress
) -> None:
    """Tell the user if a run of the new length would have had other rates so far, and so other weights."""
    old_total = before.get("total_steps", progress.total_steps)
    if old_total == progress.total_steps or not isinstance(scheduler, LambdaLR):
        return
    spare = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    old, new = make_scheduler(options, spare, old_total).lr_lambdas[0], scheduler.lr_lambdas[0]
    if any(old(step) != new(step) for step in range(scheduler.last_epoch)):
        warn(
            f"the learning rate's curve depends on the length of the run: one of {progress.total_steps} steps would "
            f"have had other rates in the first {scheduler.last_epoch}, so this one becomes another than that"
        )


def _rates_at(scheduler: LambdaLR, base_rates: list[float], step: int) -> list[float]:
    return [base * curve(step) for base, curve in zip(base_rates, scheduler.lr_lambdas, strict=True)]
