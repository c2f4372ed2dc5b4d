"""What moves the weights: the optimizer, its rates, and the engine that runs the root module."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from library.options.optimizer import OptimizerOptions
from library.options.scheduler import SchedulerOptions
from library.training.device import engines
from library.training.methods.base import Method, ParameterGroup
from library.training.optimization.optimizers import make_optimizer
from library.training.optimization.schedulers import make_scheduler
from library.training.optimization.stepper import Stepper
from library.training.optimization.steppers import make_stepper
from library.training.outlook import Outlook
from library.training.step import TrainingStep


@dataclass(frozen=True)
class Motion:
    """What moves the weights."""

    root: nn.Module
    """The step as the engine runs it."""
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    stepper: Stepper


def set_in_motion(run: Outlook, method: Method, step: TrainingStep) -> Motion:
    """Optimizer, rates and engine, as at the first step of a new run."""
    groups = method.parameter_groups()
    train_only(step, groups)
    step.text_steps = text_steps(step, groups)
    optimizer = make_optimizer(run.settings[OptimizerOptions], groups)
    scheduler = make_scheduler(run.settings[SchedulerOptions], optimizer, run.progress.total_steps)
    root, prepared, groups = engines.prepare(run.accelerator, step, optimizer, groups)
    stepper = make_stepper(run, method, root, prepared, scheduler, groups)
    return Motion(root, groups, optimizer, scheduler, stepper)


def text_steps(step: TrainingStep, groups: list[ParameterGroup]) -> int | None:
    """In how many of the run's first steps weights of the text encoders are trained; None if not in the first only."""
    own = set(step.model.text_encoders.parameters())
    counts = {group.steps for group in groups if not own.isdisjoint(group.parameters)}
    return None if None in counts else max(counts, default=None)


def train_only(step: nn.Module, groups: list[ParameterGroup]) -> None:
    """Ask for gradients of what the optimizer will move and of nothing else."""
    step.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
