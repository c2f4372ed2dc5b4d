"""What the user is shown before and after training."""

import math

import torch
from accelerate import Accelerator

from library.data.report.summary import Summary
from library.training.methods.base import ParameterGroup
from library.training.optimization.movement import Movement
from library.training.resuming.state import Progress


def before_training(
    summary: Summary,
    progress: Progress,
    groups: list[ParameterGroup],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> str:
    """What will be trained on, for how long, and how fast it is learned."""
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    steps = f"{progress.total_steps} optimizer step{'s' * (progress.total_steps > 1)}"
    count = round(progress.total_steps / summary.steps_per_epoch, 2)
    epochs = f"{count:g} epoch{'s' * (count != 1)}"
    lines = [
        "",
        str(summary),
        f"in all: {steps} in {epochs} on {accelerator.device}{processes}",
    ]
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        count = sum(parameter.numel() for parameter in group.parameters)
        rate = "of its own" if own.get("relative_step") else f"{group.learning_rate:g}"
        until = "" if group.trained_in(progress.total_steps - 1) else f", in the first {group.steps} steps only"
        lines.append(f"trained: {group.name}, {count:,} parameters, learning rate {rate}{until}")
    return "\n".join([*lines, ""])


def after_training(movement: Movement, left_out: int, validation: str = "") -> str:
    """How far each group has come, how well, and how many images were left out. `validation` may be nothing."""
    changes = movement.relative_changes().items()
    lines = [
        f"{name}: weights changed by {change:.2%} of their size"
        if math.isfinite(change)
        else f"{name}: weights changed, which were all 0 at first"
        for name, change in changes
    ]
    if validation:
        lines.append(validation)
    if left_out:
        lines.append(f"images that could not be decoded and were not trained on: {left_out}")
    return "\n".join(lines)
