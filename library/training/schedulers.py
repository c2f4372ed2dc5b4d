"""Learning rates over time."""

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from library.options.scheduler import SchedulerOptions


def make_scheduler(options: SchedulerOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The course of --lr_scheduler over `total_steps` optimizer steps; it steps once per optimizer step."""
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.warmup_steps(total_steps),
        num_training_steps=total_steps,
    )
