"""When and under which names trained files and states appear, and which of them stay."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.console import notice, warn
from library.errors import UserError, some
from library.models.writing import overflowing
from library.options.saving import SaveOptions
from library.replacing import remove
from library.training import together
from library.training.device import engines
from library.training.ema import Ema
from library.training.health import NotFinite
from library.training.methods.base import Method
from library.training.published import Published
from library.training.resuming.state import Progress, TrainState
from library.training.resuming.states import SUFFIX, file_names
from library.training.retention import Series, all_series
from library.training.tracking import Tracker
from library.training.upload import Uploader

Describe = Callable[[Progress], Mapping[str, str]]


class Saver:
    """Writes what is trained under numbered names beside `target` and at last under that, and the state of the run
    beside it. `describe` gives a file's metadata, `published` makes the trained tensors those to save while it lasts.

    All processes call it, and the first one writes. What is saved on the way and does not fit on the disk is no reason
    to end a run; what is not finite is.
    """

    def __init__(
        self,
        options: SaveOptions,
        target: Path,
        method: Method,
        dtype: torch.dtype,
        describe: Describe,
        published: Published,
        state: TrainState,
        tracker: Tracker,
        ema: Ema | None,
        uploader: Uploader,
    ):
        self.options = options
        self.target = target
        self.method = method
        self.dtype = dtype
        self.describe = describe
        self.published = published
        self.state = state
        self.tracker = tracker
        self.ema = ema
        self.uploader = uploader
        self.series = all_series(options)
        self.latest: str | None = None
        """The stem of what was saved last with its state."""
        self.state_step: int | None = None
        """The step of this run's last state; None if there is none."""

    def save_step(self, progress: Progress) -> None:
        self._save_numbered(self.options.step_stem(progress.step), "steps", progress.step, progress)

    def save_epoch(self, progress: Progress) -> None:
        self._save_numbered(self.options.epoch_stem(progress.epoch), "epochs", progress.epoch, progress)

    def save_now(self, progress: Progress) -> None:
        """The state and then what is trained, out of turn: because it is asked for, or the run has to end."""
        stem = self.options.step_stem(progress.step)
        if stem != self.latest:
            # the state knows of the file, too, so that the run which goes on with it removes that in its time
            self._note("steps", progress.step, self._targets(stem))
            stated = went_well(self._save_state(stem, "steps", progress.step, progress))
            self._save_model(stem, "steps", progress.step, progress)
            if stated:
                self.latest = stem

    def save_final(self, progress: Progress) -> None:
        """UserError if the file cannot be written: there is no later time to try it again but that of a run which goes
        on with the state, so there is one then.
        """
        problem = self._write_once(self.target.name, progress)
        if problem is not None:
            stem = self.options.step_stem(progress.step)
            if self.state_step != progress.step:
                self._save_state(stem, "steps", progress.step, progress)
            again = self.state_step == progress.step
            raise UserError(f"{problem}; --resume latest tries it again" if again else str(problem))
        if self.options.save_state or self.options.save_state_on_train_end:
            problem = self._write_state(self.target.name, progress)
            if problem is not None:
                raise problem

    def save_as(self, stem: str, progress: Progress) -> bool:
        """What is trained, under a name of its own that is written again and again. Whether it could be written."""
        return went_well(self._write_once(stem, progress))

    def rotate(self) -> None:
        """Remove what should be gone already, and is not where a run was killed."""
        for series in self.series.values():
            self._remove_outdated(series, max(series.written, default=0))

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.target.name, **{name: dict(series.written) for name, series in self.series.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what the run has saved before. What is of a run of another name is not this one's to remove."""
        if state.get("name", self.target.name) != self.target.name:
            return
        own = re.compile(file_names(self.target.name))
        for name, series in self.series.items():
            found = {number: list(filter(own.fullmatch, names)) for number, names in state.get(name, {}).items()}
            series.written = {number: names for number, names in found.items() if names}
        self.state_step = self.state.progress.step
        if together.is_first():
            self.rotate()

    def _save_numbered(self, stem: str, series: str, number: int, progress: Progress) -> None:
        self._save_model(stem, series, number, progress)
        if self.options.save_state and went_well(self._save_state(stem, series, number, progress)):
            self.latest = stem

    def _save_model(self, stem: str, series: str, number: int, progress: Progress) -> None:
        if went_well(self._write_once(stem, progress)):
            self._note(series, number, self._targets(stem))
            if together.is_first():
                self._remove_outdated(self.series[series], number)

    def _save_state(self, stem: str, series: str, number: int, progress: Progress) -> UserError | None:
        """The state knows of itself, so that the run which goes on with it removes it in its time. Returns why it could
        not be written.
        """
        states = f"states of {series}"
        self._note(states, number, [self.target.with_name(f"{stem}{SUFFIX}")])
        problem = self._write_state(stem, progress)
        if problem is not None:
            del self.series[states].written[number]
            return problem
        self.state_step = progress.step
        if together.is_first():
            self._remove_outdated(self.series[states], number)
        return None

    def _targets(self, stem: str) -> list[Path]:
        """What is written under a name: what is trained, and its moving average."""
        stems = [stem] if self.ema is None else [stem, f"{stem}-ema"]
        return [self.method.target(self.target.with_name(each)) for each in stems]

    def _note(self, series: str, number: int, paths: list[Path]) -> None:
        self.series[series].add(number, [path.name for path in paths])

    def _remove_outdated(self, series: Series, now: int) -> None:
        for number in series.outdated(list(series.written), now):
            for name in series.written[number]:
                with suppress(OSError):  # somebody has it open; it may stay
                    remove(self.target.with_name(name))
            del series.written[number]

    def _write_once(self, stem: str, progress: Progress) -> UserError | None:
        """What is trained, by the first process while the others wait; returns in all of them why it could not be
        written. NotFinite is raised.
        """
        self.tracker.flush()  # every process notices alike if the run has gone wrong
        problem = None
        with self.published(), engines.first_looks(self.state.step) as first:
            if first:
                problem = hindrance(lambda: self._write(stem, progress))
        return together.first_says(problem)

    def _write(self, stem: str, progress: Progress) -> None:
        """Write what is trained, and its moving average beside it. NotFinite, see there."""
        metadata = self.describe(progress)
        self._require_finite(progress, self.dtype)
        paths = [self.method.save(self.target.with_name(stem), self.dtype, metadata)]
        if self.ema is not None:
            with self.ema.swapped():
                self._require_finite(progress, self.dtype)
                paths.append(self.method.save(self.target.with_name(f"{stem}-ema"), self.dtype, metadata))
        for path in paths:
            notice(f"saved {path}")
            self.uploader.upload(path)

    def _write_state(self, stem: str, progress: Progress) -> UserError | None:
        """All processes call it, and leave it together; returns in all of them why it could not be written. NotFinite
        is raised, and so is UserError where all of them write it together: one that fails must not leave the others
        waiting.
        """
        folder = self.target.with_name(f"{stem}{SUFFIX}")
        self.tracker.flush()
        problem = None
        if self.state.is_spread:
            self._write_folder(folder, progress)
        elif together.is_first():
            problem = hindrance(lambda: self._write_folder(folder, progress))
        return together.first_says(problem)

    def _write_folder(self, folder: Path, progress: Progress) -> None:
        self._require_finite(progress)
        self.state.save(folder)
        if together.is_first():
            notice(f"saved {folder}")
            self.uploader.upload_state(folder)

    def _require_finite(self, progress: Progress, dtype: torch.dtype = torch.float32) -> None:
        """NotFinite if losses or weights are not, so that nothing good is overwritten. UserError if weights in the file
        are too large for the type that it is saved in, trained or not.
        """
        self.tracker.require_finite_losses()
        step = self.state.step
        if not all_finite(step.trained):
            raise NotFinite(
                f"the weights are no longer finite after step {progress.step}, so nothing is saved: lower the learning "
                "rate"
            )
        check_range(self.method.saved(step.model, step.trained), dtype, f"after step {progress.step}")


def hindrance(write: Callable[[], Any]) -> UserError | None:
    """Why something cannot be written, None if it is. NotFinite is passed on."""
    try:
        write()
    except NotFinite:
        raise
    except UserError as problem:
        return problem
    return None


def went_well(problem: UserError | None) -> bool:
    """Whether something could be written; if not, the user is told why, and that the run goes on."""
    if problem is not None:
        warn(f"{problem}: the training goes on without it")
    return problem is None


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter and buffer holds only finite values; of those that are spread over processes, this one's
    part.
    """
    extremes = [torch.zeros(2)]  # the smallest and the largest value are not finite if any is not
    for tensor in (*module.parameters(), *module.buffers()):
        own = engines.local(tensor)
        if own.is_floating_point() and own.numel():
            extremes.append(torch.stack(torch.aminmax(own)).float().cpu())
    return bool(torch.cat(extremes).isfinite().all())


def check_range(saved: nn.Module, dtype: torch.dtype, when: str) -> None:
    """UserError if a file of this type would hold infinities in place of weights. `when` is for the sentence."""
    if names := overflowing(saved, dtype):
        raise UserError(
            f"the weights {when} are too large for the {str(dtype).removeprefix('torch.')} that they are saved in "
            f"({len(names)} of their tensors: {some(names)}), so no file is written: use --save_precision float or bf16"
        )
