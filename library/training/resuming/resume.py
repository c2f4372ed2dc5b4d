"""Going on with a run: where it starts, and how everything gets back into its place."""

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.console import notice, warn
from library.errors import UserError
from library.models.files.checkpoint import open_weights
from library.options.base import options_of
from library.options.resume import ResumeOptions
from library.options.scheduler import SchedulerOptions
from library.training import together
from library.training.device import engines
from library.training.optimization.courses import course, put_at, require_rates, sample, take_over
from library.training.optimization.optimizers import finds_steps, load_optimizer
from library.training.optimization.schedulers import planned
from library.training.requests import RunEnded
from library.training.resuming import foreign_state
from library.training.resuming.differences import (
    other_groups,
    require_same_words,
    say_differences,
    what_does_not_fit,
)
from library.training.resuming.packing import check_shapes
from library.training.resuming.state import Progress, TrainState, load_trained, read_objects
from library.training.resuming.states import ENGINE, LATEST, SUFFIX, TRAINED, StateFolder, read

if TYPE_CHECKING:
    from library.training.motion import Motion

_COMPARED = 1000  # points of two curves


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
        require_same_words(resumed.facts, state.facts)
        (load_trained if resumed.ours else foreign_state.load_trained)(resumed.folder, state.step.trained)
    except ValueError as problem:
        raise _of_something_else(resumed, state.facts, problem) from None


def foresee(resumed: StateFolder, trained: nn.Module, now: Mapping[str, Any], step: int) -> None:
    """Say what going on with a state would mean, from names and shapes alone. UserError if it does not fit."""
    if (resumed.folder / TRAINED).is_file():
        with open_weights(resumed.folder / TRAINED) as file:
            shapes = {key: file.shape(key) for key in file.keys()}  # noqa: SIM118
        try:
            require_same_words(resumed.facts, now)
            check_shapes(trained, shapes)
        except ValueError as problem:
            raise _of_something_else(resumed, now, problem) from None
    if resumed.facts.get("optimizer") == now["optimizer"] and (others := other_groups(resumed.facts, now)):
        raise _of_something_else(resumed, now, ValueError(others))
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
) -> bool:
    """Put everything else back. `new_rates`: the learning rates of the command line win over those of the state.
    Returns whether the learning rates follow another curve than before.
    """
    if resumed.ours:
        say_differences(resumed.facts, state.facts, state.progress.step)
        saved = read_objects(resumed)
    else:
        saved = foreign_state.objects(resumed.folder, state.facts["optimizer"], state.progress.step)
    if resumed.ours and resumed.facts.get("optimizer") != state.facts["optimizer"]:
        saved.pop("optimizer", None)
    elif "optimizer_args" in (before := resumed.facts.get("settings", {})):
        state.facts["settings"]["optimizer_args"] = before["optimizer_args"]  # the optimizer keeps them
    _restore_optimizer(saved.pop("optimizer", None), resumed, state, motion)
    others = _restore_curve(saved.pop("scheduler", None), resumed, state, motion, options, new_rates=new_rates)
    for name, thing in state.objects.items():
        if name in saved:
            thing.load_state_dict(saved[name])
    notice(f"going on after step {state.progress.step} with {resumed.folder}")
    return others


def _restore_optimizer(saved: dict[str, Any] | None, resumed: StateFolder, state: TrainState, motion: "Motion") -> None:
    if saved is None:
        return
    found_steps = finds_steps(motion.optimizer)
    if resumed.ours and (others := other_groups(resumed.facts, state.facts)):
        raise _of_something_else(resumed, state.facts, ValueError(others))  # whose shapes may all be the same
    try:
        load_optimizer(motion.optimizer, saved)
    except ValueError as problem:
        if resumed.ours:
            raise _of_something_else(resumed, state.facts, problem) from None
        warn(f"the optimizer starts anew, because the state's does not fit what is trained ({problem})")
    if finds_steps(motion.optimizer) != found_steps:
        raise UserError(
            "--optimizer_args: the AdaFactor of the state has another relative_step, and keeps it: give the one that "
            "it was started with"
        )


def _restore_curve(
    saved: Mapping[str, Any] | None,
    resumed: StateFolder,
    state: TrainState,
    motion: "Motion",
    options: SchedulerOptions,
    *,
    new_rates: bool,
) -> bool:
    """Put the learning rates back; see `restore`."""
    place = state.progress.step if saved is None else saved["last_epoch"]
    are_new = _restore_rates(motion, new_rates)
    rates = [group["asked_rate"] for group in motion.optimizer.param_groups]
    total = state.progress.total_steps
    make = functools.partial(planned, options, motion.optimizer, rates)
    ahead = make(total)
    old, new = resumed.facts.get("settings", {}), state.facts["settings"]
    own = {option.name for option in options_of(SchedulerOptions)} & old.keys()
    others = any(old[name] != new[name] for name in own)
    if others and old.get("lr_scheduler_type"):
        _forget_momentum(motion.optimizer)
    restore_scheduler(motion.scheduler, ahead, place, None if are_new else saved)
    require_rates(ahead, state.progress.step, total)
    differs = are_new or others
    before = resumed.progress.get("total_steps", total)
    if before != total:
        _say_if_curve_differs(make(before), make(total), place, total)
        shared = total if isinstance(ahead, LambdaLR) else min(before, total)  # classes may refuse more steps
        differs |= sample(make(before), shared, _COMPARED) != sample(make(total), shared, _COMPARED)
    return differs


def _forget_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give the groups their own momentum again, which some classes of schedulers set together with the rate."""
    own = {name: optimizer.defaults[name] for name in ("betas", "momentum") if name in optimizer.defaults}
    for group in optimizer.param_groups:
        group |= own


def _restore_rates(motion: "Motion", new_rates: bool) -> bool:
    """Choose between the learning rates of the state, which are in the optimizer by now, and those of the flags.
    Returns whether those of the flags are others and win.
    """
    are_new = False
    for group, mine in zip(motion.optimizer.param_groups, motion.groups, strict=True):
        old = group.setdefault("asked_rate", group.get("initial_lr", group["lr"]))
        if group.get("relative_step") and mine.learning_rate:
            continue  # it has no effect
        if old != mine.learning_rate and new_rates:
            notice(f"{mine.name} learns at {mine.learning_rate:g} from here on, and did at {old:g}")
            group["asked_rate"] = mine.learning_rate
            are_new = True
        elif old != mine.learning_rate:
            warn(
                f"{mine.name} learns at {old:g} as before, not at {mine.learning_rate:g}: --resume_new_learning_rate "
                "lets new rates win"
            )
    return are_new


def restore_scheduler(
    scheduler: LRScheduler, ahead: LRScheduler, place: int, saved: Mapping[str, Any] | None = None
) -> None:
    """Go on with the curve of `ahead`, a spare scheduler of the same kind at its first step, after `place` steps in it;
    it goes there, too. A longer run has the curve that it would have had. Says so where that is not the `saved` rate.
    """
    put_at(ahead, place)
    take_over(scheduler, ahead)
    rates, before = ahead.get_last_lr(), list(saved["_last_lr"]) if saved else []
    if not all(map(math.isclose, before, rates)):
        now, then = (", ".join(dict.fromkeys(f"{rate:.3g}" for rate in values)) for values in (rates, before))
        notice(f"the learning rate goes on at {now}, by the curve of these flags, and not at {then} as in the state")


def _say_if_curve_differs(old: LRScheduler, new: LRScheduler, place: int, total_steps: int) -> None:
    """Tell the user if a run of the new length would have had other rates so far, and so other weights."""
    so_far = zip(range(place), course(old), course(new), strict=False)
    if any(rates != others for _, rates, others in so_far):
        warn(
            f"the learning rate's curve depends on the length of the run: one of {total_steps} steps would "
            f"have had other rates in the first {place}, so this one becomes another than that"
        )
