"""The training loop: read it once and you know the system."""

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from library.data.batch import Batch
from library.randomness import address
from library.training.events import Schedule
from library.training.methods.base import Method
from library.training.optimization.stepper import Stepper
from library.training.resuming.state import Progress
from library.training.tracking import Tracker


def train(
    *,
    loader: Iterable[Batch],  # the run's micro-batches from progress.step on, this process's share
    root: nn.Module,  # the prepared TrainingStep: Batch -> (B,) losses
    method: Method,
    stepper: Stepper,
    schedule: Schedule,  # what happens besides training, and when
    tracker: Tracker,
    progress: Progress,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Trains until `loader` ends."""
    root.train()
    for batch in tracker.fed_by(loader):
        plan = batch.plan
        # counted over all processes, so that two of them draw what one draws with twice the accumulation
        seed_generators(seed, "micro-batch", plan.epoch, plan.step, plan.micro * world + rank)
        method.on_micro_step(batch)
        with stepper.micro_step(plan):
            losses = root(batch.to(device))
            stepper.backward(losses, plan)
        tracker.add(losses, batch)
        if plan.last_micro:
            method.before_step()
            info = stepper.step()
            progress.advance(plan)
            method.after_step(progress.step)
            tracker.step(info, progress)
            for event in schedule.due(progress):
                event(progress)


def seed_generators(*parts: int | str) -> None:
    """Give the global generators (first weights, dropout, networks of other people) the address of a choice."""
    value = address(*parts)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
