"""Previews: what the weights of this step would paint."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Image

from library.console import warn
from library.errors import UserError
from library.generation.paint import evaluating, paint
from library.generation.prompts import PromptLine
from library.options.preview import PreviewOptions
from library.randomness import address
from library.replacing import replacing
from library.training.device import engines, memory
from library.training.device.placement import on_device
from library.training.published import Published
from library.training.resuming.state import Progress
from library.training.resuming.states import SAMPLES
from library.training.step import TrainingStep
from library.training.tracking import Tracker


class Previewer:
    """Paints the prompts of --sample_prompts into the log and a folder `sample` beside `target`, and moves nothing."""

    def __init__(
        self,
        options: PreviewOptions,
        prompts: Sequence[PromptLine],
        target: Path,
        step: TrainingStep,
        published: Published,
        tracker: Tracker,
        accelerator: Accelerator,
    ):
        self.options = options
        self.requests = [with_seed(prompt, number) for number, prompt in enumerate(prompts)]
        self.folder = target.parent / SAMPLES
        self.name = target.name
        self.published = published
        self.root = step
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
        with self.published(), engines.first_looks(self.root) as first:
            if first:
                pictures: dict[str, Image] = {}
                try:
                    with memory.enough_for("a preview", memory.PICTURE_ADVICE):
                        self._paint(pictures, stamp)
                except UserError as problem:
                    warn(f"{problem}; the training goes on without it")
                self.tracker.log.pictures(pictures, progress.step)

    def _paint(self, pictures: dict[str, Image], stamp: str) -> None:
        """`pictures` gets what is painted, as far as that comes."""
        now = time.strftime("%Y%m%d%H%M%S")
        with evaluating(self.trained), on_device(self.model, self.accelerator.device):
            for number, request in enumerate(self.requests):
                picture = paint(self.model, request, default_sampler=self.options.sample_sampler)
                pictures[f"preview/{number}"] = picture
                file = self.folder / f"{self.name}_{stamp}_{number:02d}_{now}_{request.seed}.png"
                try:
                    with replacing(file) as whole:
                        picture.save(whole, "png")
                except UserError as problem:
                    warn(f"{problem}: the training goes on without it")


def with_seed(prompt: PromptLine, number: int) -> PromptLine:
    """A prompt without a seed gets one from its place in the file, so that its pictures of different steps compare."""
    if prompt.seed is not None:
        return prompt
    return dataclasses.replace(prompt, seed=address("preview", number) % 2**32)
