"""What happens besides training: previews, saves, checks; each knows when it is due."""

import signal
from collections.abc import Callable
from typing import Protocol

from accelerate import Accelerator

from library.console import warn
from library.data.records import RecordTable
from library.errors import UserError
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.training.ema import Ema
from library.training.lagged import LaggedCopy
from library.training.optimization.movement import Movement
from library.training.previews import Previewer
from library.training.requests import Requests, RunEnded
from library.training.resuming.state import Progress
from library.training.saving import Saver
from library.training.step import TrainingStep
from library.training.timesteps import Timesteps


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


def saves_step(options: SaveOptions, progress: Progress) -> bool:
    """Whether --save_every_n_steps asks for a numbered file after the step just done."""
    return every(options.save_every_n_steps, progress.step)


def saves_epoch(options: SaveOptions, progress: Progress) -> bool:
    """Whether --save_every_n_epochs or --save_n_epoch_ratio do; the last epoch's is the final file."""
    interval = options.epoch_interval(progress.total_epochs)
    return progress.epoch_ended and not progress.finished and every(interval, progress.epoch)


def paints(options: PreviewOptions, progress: Progress) -> bool:
    """Whether previews follow the step just done."""
    by_epochs = progress.epoch_ended and every(options.epoch_interval, progress.epoch)
    return by_epochs or every(options.step_interval, progress.step)


def preview_stamp(options: PreviewOptions, progress: Progress) -> str:
    """What their names tell of when that was."""
    return f"e{progress.epoch:06d}" if options.epoch_interval else f"{progress.step:06d}"


class SaveStep:
    """A numbered file after every --save_every_n_steps, the last step included."""

    def __init__(self, options: SaveOptions, saver: Saver):
        self.options = options
        self.saver = saver

    def due(self, progress: Progress) -> bool:
        return saves_step(self.options, progress)

    def __call__(self, progress: Progress) -> None:
        self.saver.save_step(progress)


class SaveEpoch:
    """A numbered file after every --save_every_n_epochs or as --save_n_epoch_ratio says; the last epoch's is the final
    file.
    """

    def __init__(self, options: SaveOptions, saver: Saver):
        self.options = options
        self.saver = saver

    def due(self, progress: Progress) -> bool:
        return saves_epoch(self.options, progress)

    def __call__(self, progress: Progress) -> None:
        self.saver.save_epoch(progress)


class Preview:
    """Pictures after every --sample_every_n_epochs, or else every --sample_every_n_steps."""

    def __init__(self, options: PreviewOptions, previewer: Previewer):
        self.options = options
        self.previewer = previewer

    def due(self, progress: Progress) -> bool:
        return paints(self.options, progress)

    def __call__(self, progress: Progress) -> None:
        self.previewer.paint(progress, preview_stamp(self.options, progress))


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


class LearnTimesteps:
    """After every step, where what is drawn learns from losses. Comes before whatever stores it."""

    def __init__(self, timesteps: Timesteps, accelerator: Accelerator):
        self.timesteps = timesteps
        self.accelerator = accelerator

    def due(self, progress: Progress) -> bool:
        return self.timesteps.learns

    def __call__(self, progress: Progress) -> None:
        self.timesteps.learn(self.accelerator.reduce)  # which sums


class AverageWeights:
    """After every step: the moving average takes in the weights."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def due(self, progress: Progress) -> bool:
        return True

    def __call__(self, progress: Progress) -> None:
        self.ema.update()


class Obey:
    """After every step: what the user has asked for meanwhile."""

    def __init__(self, requests: Requests, saver: Saver, previewer: Previewer):
        self.requests = requests
        self.saver = saver
        self.previewer = previewer

    def due(self, progress: Progress) -> bool:
        return True

    def __call__(self, progress: Progress) -> None:
        heard = self.requests.heard()
        if not heard:
            return
        if "sample" in heard and not self.previewer.requests:
            warn(f"{self.requests.control_file}: there is nothing to paint, give --sample_prompts a file of prompts")
        elif "sample" in heard:
            self.previewer.paint(progress, f"{progress.step:06d}")
        ending = heard - {"sample", "save"}
        if progress.finished or heard == {"sample"}:
            return
        self.saver.save_now(progress)
        if ending:
            raise ended_by(ending, progress, self.saver.state_step)


def ended_by(requests: set[str], progress: Progress, state_step: int | None) -> RunEnded:
    """Why and how a run ends that is asked to, and what there is to go on from: the state of `state_step`, if any. 128
    and the signal's number is what shells make of one.
    """
    numbers = [signal.Signals[name] for name in sorted(requests) if name in signal.Signals.__members__]
    why = f"by {numbers[0].name}" if numbers else "as the control file asks"
    if state_step == progress.step:
        then = "--resume latest goes on from there"
    elif state_step is not None:
        then = f"no state could be written, so --resume latest goes on after step {state_step}, and the rest is lost"
    else:
        then = "no state could be written, and there is none of before to go on from"
    message = f"ended {why} after step {progress.step} of {progress.total_steps}: {then}"
    return RunEnded(message, 128 + numbers[0] if numbers else 0)
