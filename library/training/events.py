"""What happens besides training: previews, saves, checks; each knows when it is due."""

from collections.abc import Callable
from typing import Protocol

from library.data.records import RecordTable
from library.errors import UserError
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.training.movement import Movement
from library.training.previews import Previewer
from library.training.saving import Saver
from library.training.state import Progress
from library.training.step import TrainingStep
from library.training.tracking import LaggedCopy


class Event(Protocol):
    """Something that happens between two steps and leaves the run as it was."""

    def due(self, progress: Progress) -> bool: ...
    def __call__(self, progress: Progress) -> None: ...


class Schedule:
    """The run's events in their order, and those of its beginning and its end."""

    def __init__(
        self,
        events: list[Event],
        at_start: list[Callable[[Progress], None]] | None = None,
        at_end: list[Callable[[Progress], None]] | None = None,
    ):
        self.events = events
        self.at_start = at_start or []
        self.at_end = at_end or []

    def due(self, progress: Progress) -> list[Event]:
        """The events that follow the step just done."""
        return [event for event in self.events if event.due(progress)]

    def start(self, progress: Progress) -> None:
        for action in self.at_start:
            action(progress)

    def finish(self, progress: Progress) -> None:
        for action in self.at_end:
            action(progress)


def every(interval: int | None, count: int) -> bool:
    """Whether `count` is a multiple of an interval that is set."""
    return bool(interval) and count % interval == 0


class SaveStep:
    """A numbered file after every --save_every_n_steps, the last step included."""

    def __init__(self, options: SaveOptions, saver: Saver):
        self.interval = options.save_every_n_steps
        self.saver = saver

    def due(self, progress: Progress) -> bool:
        return every(self.interval, progress.step)

    def __call__(self, progress: Progress) -> None:
        self.saver.save_step(progress)


class SaveEpoch:
    """A numbered file after every --save_every_n_epochs; the last epoch's is the final file."""

    def __init__(self, options: SaveOptions, saver: Saver):
        self.interval = options.save_every_n_epochs
        self.saver = saver

    def due(self, progress: Progress) -> bool:
        return progress.epoch_ended and not progress.finished and every(self.interval, progress.epoch)

    def __call__(self, progress: Progress) -> None:
        self.saver.save_epoch(progress)


class Preview:
    """Pictures after every --sample_every_n_epochs, or else every --sample_every_n_steps."""

    def __init__(self, options: PreviewOptions, previewer: Previewer):
        self.options = options
        self.previewer = previewer

    def due(self, progress: Progress) -> bool:
        by_epochs = progress.epoch_ended and every(self.options.epoch_interval, progress.epoch)
        return by_epochs or every(self.options.step_interval, progress.step)

    def __call__(self, progress: Progress) -> None:
        by_epochs = bool(self.options.epoch_interval)
        self.previewer.paint(progress, f"e{progress.epoch:06d}" if by_epochs else f"{progress.step:06d}")


class CheckLatents:
    """After every step: were the latents of the step before finite? Read late, so that the device never waits."""

    def __init__(self, step: TrainingStep, table: RecordTable):
        self.step = step
        self.table = table
        self.on_the_way: list[tuple[LaggedCopy, list[int]]] = []

    def due(self, progress: Progress) -> bool:
        return bool(self.step.unusable or self.on_the_way)

    def __call__(self, progress: Progress) -> None:
        self.check()
        self.on_the_way = [(LaggedCopy(flags), records) for flags, records in self.step.unusable]
        self.step.unusable.clear()
        if progress.finished:
            self.check()

    def check(self) -> None:
        """UserError for the first image whose latents were not finite; nothing was learned from it."""
        for flags, records in self.on_the_way:
            for is_unusable, record in zip(flags.read(), records, strict=True):
                if is_unusable:
                    path = self.table[record].path
                    raise UserError(f"{path}: the VAE's latents for this image are not finite: use --no_half_vae")


class CheckMovement:
    """Once, as soon as it can be judged: does every group get gradients?"""

    def __init__(self, movement: Movement):
        self.movement = movement
        self.done = False

    def due(self, progress: Progress) -> bool:
        return not self.done and (self.movement.observed or progress.finished)

    def __call__(self, progress: Progress) -> None:
        self.done = True
        self.movement.check()
