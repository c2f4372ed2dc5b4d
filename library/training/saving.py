"""When and under which names trained files appear."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from library.console import notice
from library.errors import UserError
from library.options.saving import SaveOptions
from library.training.methods.base import Method
from library.training.state import Progress
from library.training.step import TrainingStep
from library.training.tracking import Tracker

Describe = Callable[[Progress], Mapping[str, str]]


class Saver:
    """Writes the trained part under numbered names beside `target`, and at last under that. `describe` gives a file's
    metadata.
    """

    def __init__(
        self,
        options: SaveOptions,
        target: Path,
        method: Method,
        step: TrainingStep,
        dtype: torch.dtype,
        describe: Describe,
        tracker: Tracker,
        accelerator: Accelerator,
    ):
        self.options = options
        self.target = target
        self.method = method
        self.trained = step.trained
        self.dtype = dtype
        self.describe = describe
        self.tracker = tracker
        self.accelerator = accelerator

    def save_step(self, progress: Progress) -> None:
        self._save(f"{self.options.output_name or 'at'}-step{progress.step:08d}", progress)

    def save_epoch(self, progress: Progress) -> None:
        self._save(f"{self.options.output_name or 'epoch'}-{progress.epoch:06d}", progress)

    def save_final(self, progress: Progress) -> None:
        self._save(self.target.name, progress)

    def _save(self, stem: str, progress: Progress) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.target.with_name(stem)
        self.tracker.require_finite_losses()
        with self.method.published_weights():
            if not all_finite(self.trained):
                raise UserError(
                    f"the weights are no longer finite after step {progress.step}, so {path} is not written: lower the "
                    "learning rate"
                )
            path = self.method.save(path, self.options.save_model_as, self.dtype, self.describe(progress))
        notice(f"saved {path}")


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter and buffer holds finite values only."""
    tensors = [*module.parameters(), *module.buffers()]
    return all(math.isfinite(float(tensor.float().sum())) for tensor in tensors if tensor.is_floating_point())
