"""Previews: what the weights of this step would paint."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from library.console import warn
from library.generation.paint import evaluating, paint
from library.generation.prompts import PromptLine
from library.options.preview import PreviewOptions
from library.randomness import address
from library.training.methods.base import Method
from library.training.placement import on_device
from library.training.state import Progress
from library.training.step import TrainingStep
from library.training.tracking import Tracker


class Previewer:
    """Paints the prompts of --sample_prompts into the log and a folder `sample` beside `target`, and moves nothing."""

    def __init__(
        self,
        options: PreviewOptions,
        prompts: Sequence[PromptLine],
        target: Path,
        method: Method,
        step: TrainingStep,
        tracker: Tracker,
        accelerator: Accelerator,
    ):
        self.options = options
        self.requests = [with_seed(prompt, number) for number, prompt in enumerate(prompts)]
        self.folder = target.parent / "sample"
        self.name = target.name
        self.method = method
        self.model = step.model
        self.trained = step.trained
        self.tracker = tracker
        self.accelerator = accelerator

    def paint_at_first(self, progress: Progress) -> None:
        """Before the first step, where --sample_at_first asks for it."""
        if self.options.sample_at_first and progress.step == 0:
            self.paint(progress, f"{0:06d}")

    def paint(self, progress: Progress, stamp: str) -> None:
        """Files are named `<name>_<stamp>_<number>_<time>_<seed>.png`."""
        if not self.accelerator.is_main_process:
            return
        now, pictures = time.strftime("%Y%m%d%H%M%S"), {}
        device = self.accelerator.device
        with self.method.published_weights(), evaluating(self.trained), on_device(self.model, device):
            for number, request in enumerate(self.requests):
                picture = paint(self.model, request, default_sampler=self.options.sample_sampler)
                pictures[f"preview/{number}"] = picture
                file = self.folder / f"{self.name}_{stamp}_{number:02d}_{now}_{request.seed}.png"
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    picture.save(file)
                except OSError as error:
                    warn(f"{file} could not be written ({error.strerror or error}), training goes on without it")
        self.tracker.log_pictures(pictures, progress.step)


def with_seed(prompt: PromptLine, number: int) -> PromptLine:
    """A prompt without a seed gets one from its place in the file, so that its pictures of different steps compare."""
    if prompt.seed is not None:
        return prompt
    return dataclasses.replace(prompt, seed=address("preview", number) % 2**32)
