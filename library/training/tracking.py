"""Eyes on the run: what is measured of every step, and the progress bar."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from library.bars import progress_bar
from library.data.batch import Batch
from library.errors import some
from library.training.health import Health, NotFinite
from library.training.lagged import LaggedCopy
from library.training.logs import Log
from library.training.optimization.stepper import StepInfo
from library.training.resuming.state import Progress
from library.transfer import to_device

_WINDOW = 100  # steps that averages look back
_SPAN = 250  # timesteps in each of the ranges whose losses are averaged apart
RANGES = {f"{low:03d}-{low + _SPAN - 1:03d}": (low, low + _SPAN) for low in range(0, 1000, _SPAN)}
"""The quarters of the schedule by name: first timestep, and first of the next quarter."""
_IMAGES_NAMED = 8


@dataclass(frozen=True)
class _Measured:
    """A step that is not shown yet."""

    step: int
    values: LaggedCopy  # loss; of each range the sum and the number of losses; gradient norm; what else is measured
    names: list[str]  # of the latter
    info: StepInfo
    samples: list[tuple[Tensor, list[int]]]  # of this process's micro-batches: losses (B,) and records


class Tracker:
    """Collects losses and shows and logs them one step late, so that the device never waits to be read.

    `timesteps_of(batch)` are those it is trained at, (B,) on the CPU; `name_of(record)` is how messages call an image;
    `importance_of(timesteps)` is a factor in losses that averages of ranges have to undo, (B,) on the CPU, if any.
    `measured()` is what is logged of a step besides, by name, as tensors of one value or numbers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        timesteps_of: Callable[[Batch], Tensor],
        name_of: Callable[[int], str],
        importance_of: Callable[[Tensor], Tensor | None] = lambda timesteps: None,
        measured: Callable[[], Mapping[str, Tensor | float]] = dict,
    ):
        self.accelerator = accelerator
        self.log = Log(accelerator)
        self.timesteps_of = timesteps_of
        self.name_of = name_of
        self.importance_of = importance_of
        self.measured = measured
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.of_ranges: list[deque[tuple[float, float]]] = [deque(maxlen=_WINDOW) for _ in RANGES]  # sum and number
        self.health = Health()
        self.values: Tensor | None = None  # of the step that is under way: loss, sums and numbers of the ranges
        self.samples: list[tuple[Tensor, list[int]]] = []
        self.pending: _Measured | None = None
        self.bar = progress_bar(disable=True)
        self.speeds: deque[float] = deque(maxlen=_WINDOW)  # images per second of each step
        self.last_step = time.monotonic()
        self.waited = 0.0  # seconds of this step in which there was no batch
        self.times: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # of each step: seconds waited, and in all

    @contextmanager
    def shown(self, progress: Progress) -> Iterator[None]:
        """While it lasts, the bar is on the console, and can be read there afterwards."""
        self.bar = progress_bar(
            total=progress.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.last_step = time.monotonic()
        try:
            yield
        finally:
            self.bar.close()

    def fed_by(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches, with a clock on how long they let the step wait."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - asked
            yield batch

    def add(self, losses: Tensor, batch: Batch) -> None:
        """A micro-batch, still on the CPU, and its losses (B,)."""
        self.images_in_step = batch.plan.images_in_step
        losses = losses.detach().float()
        timesteps = self.timesteps_of(batch)
        in_range = (timesteps // _SPAN)[:, None] == torch.arange(len(RANGES))
        counted = to_device(in_range & (batch.weights != 0)[:, None], losses.device)  # (B, ranges)
        share = losses.sum() / self.images_in_step
        sums = torch.where(counted, losses[:, None], 0).sum(dim=0)
        importance = self.importance_of(timesteps)
        numbers = counted if importance is None else counted * to_device(importance, losses.device)[:, None]
        values = torch.cat([share[None], sums, numbers.sum(dim=0)])
        self.values = values if self.values is None else self.values + values
        self.samples.append((losses, batch.records))

    def step(self, info: StepInfo, progress: Progress) -> None:
        """The end of an optimizer step: show the step before, and keep this one for the next time.

        Raises NotFinite, in every process at the same step, if the step before went wrong.
        """
        values = self.accelerator.reduce(self.values, "sum")
        now = time.monotonic()
        elapsed = max(now - self.last_step, 1e-9)
        self.speeds.append(self.images_in_step / elapsed)
        self.times.append((self.waited, elapsed))
        self.waited = 0.0
        self.last_step = now
        self._show()
        besides = self.measured()
        singles = [torch.as_tensor(value, dtype=torch.float32) for value in (info.gradient_norm, *besides.values())]
        values = torch.cat([values, *(to_device(single.reshape(1), values.device) for single in singles)])
        self.pending = _Measured(progress.step, LaggedCopy(values), list(besides), info, self.samples)
        self.values, self.samples = None, []
        self.bar.update(1)

    def flush(self) -> None:
        """Show and log the last step, and let everything logged reach the disk."""
        self._show()
        self.log.flush()

    def finish(self) -> None:
        """The same at the end of the run."""
        self.flush()
        self.log.close()

    def require_finite_losses(self) -> None:
        """NotFinite if the run went wrong so far, the last step included."""
        self._show()
        if self.health.problem is not None:
            raise NotFinite(self.health.problem)

    def _show(self) -> None:
        if self.pending is None:
            return
        measured, self.pending = self.pending, None
        loss, *rest = measured.values.read()
        of_ranges, norm, besides = rest[: 2 * len(RANGES)], rest[2 * len(RANGES)], rest[2 * len(RANGES) + 1 :]
        logs = {"loss/current": loss, "gradient_norm": norm, **self._averages(loss, of_ranges), **self._speed()}
        logs |= dict(zip(measured.names, besides, strict=True))
        logs |= {f"lr/{name}": rate for name, rate in measured.info.rates.items()}
        self.log.scalars(logs, measured.step)
        average = logs.get("loss/average", loss)
        rate = max(measured.info.rates.values())
        speed, memory = logs["images_per_second"], logs["memory"]
        self.bar.set_postfix_str(
            f"loss {average:.4f}, lr {rate:.2e}, {speed:.1f} images/s, {memory:.1f} GB", refresh=False
        )
        problem = self.health.judge(
            measured.step, loss, norm, measured.info.skipped, lambda broken: self._images(measured.samples, broken)
        )
        if problem is not None:
            self.log.flush()
            raise NotFinite(problem)

    def _averages(self, loss: float, of_ranges: list[float]) -> dict[str, float]:
        """Moving averages of all losses, and of those at timesteps that this step had. What is not finite is left
        out: steps that fp16 skips have such losses, too.
        """
        averages = {}
        if np.isfinite(loss):
            self.recent.append(loss)
        if self.recent:
            averages["loss/average"] = sum(self.recent) / len(self.recent)
        sums, counts = of_ranges[: len(RANGES)], of_ranges[len(RANGES) :]
        for name, past, total, count in zip(RANGES, self.of_ranges, sums, counts, strict=True):
            if count and np.isfinite(total):
                past.append((total, count))
                averages[f"loss/average/{name}"] = sum(t for t, _ in past) / sum(c for _, c in past)
        return averages

    def _speed(self) -> dict[str, float]:
        waited, elapsed = map(sum, zip(*self.times, strict=True))
        return {
            "images_per_second": statistics.median(self.speeds),  # unmoved by steps after which something was painted
            "waiting_for_data": waited / elapsed,
            "memory": used_memory(),
        }

    def _images(self, samples: list[tuple[Tensor, list[int]]], broken: bool) -> str:
        """Images of a step as in a sentence, all of them or those whose loss is not finite."""
        records = [
            record
            for losses, records in samples
            for loss, record in zip(losses.tolist(), records, strict=True)
            if not (broken and np.isfinite(loss))
        ]
        if not records:
            return "images: none of this process"
        return f"images: {some([self.name_of(record) for record in records], _IMAGES_NAMED)}"

    def state_dict(self) -> dict[str, Any]:
        """What the curves need to go on. Comes after `flush`."""
        return {
            "recent": list(self.recent),
            "ranges": [list(past) for past in self.of_ranges],
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])
        for past, known in zip(self.of_ranges, state["ranges"], strict=True):
            past.extend(map(tuple, known))
        self.health.load_state_dict(state["health"])


def used_memory() -> float:
    """The most device memory this process has held, or without a GPU its own memory now, in GB of 2^30 bytes."""
    held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return held / 2**30
