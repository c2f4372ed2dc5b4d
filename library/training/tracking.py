"""Eyes on the run: the progress bar and the log."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from library.data.batch import Batch
from library.data.plan import BatchPlan
from library.errors import UserError
from library.options.logging import LogOptions
from library.training.state import Progress
from library.training.stepper import StepInfo

_WINDOW = 100  # steps that the average loss looks back


def log_folder(options: LogOptions, now: time.struct_time) -> Path | None:
    """`<logging_dir>/<log_prefix><YYYYmmddHHMMSS>`, None when nothing is logged."""
    if options.logging_dir is None:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S', now)}"


def start(options: LogOptions, name: str, accelerator: Accelerator, progress: Progress) -> "Tracker":
    """Open the log, if there is to be one, and the progress bar."""
    if options.logging_dir is not None:
        accelerator.init_trackers(options.log_tracker_name or name)
    return Tracker(accelerator, progress)


class LaggedCopy:
    """A device tensor on its way to the CPU: read one step later, so that reading never waits for the device."""

    def __init__(self, tensor: Tensor):
        self.host = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self.arrived = None
        if tensor.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


class Tracker:
    """Collects losses and shows and logs them one step late, so that the device never waits to be read."""

    def __init__(self, accelerator: Accelerator, progress: Progress):
        self.accelerator = accelerator
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.loss: Tensor | None = None
        self.pending: tuple[LaggedCopy, StepInfo, Progress] | None = None
        self.bar = tqdm(
            total=progress.total_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.speeds: deque[float] = deque(maxlen=_WINDOW)  # images per second of each step
        self.last_step = time.monotonic()
        self.waited = 0.0  # seconds of this step in which there was no batch
        self.times: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # of each step: seconds waited, and in all
        self.not_finite: int | None = None  # the first step whose loss was not and which moved the weights all the same

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

    def add(self, losses: Tensor, plan: BatchPlan) -> None:
        """A micro-batch's losses (B,)."""
        self.images_in_step = plan.images_in_step
        share = losses.detach().sum() / plan.images_in_step
        self.loss = share if self.loss is None else self.loss + share

    def step(self, info: StepInfo, progress: Progress) -> None:
        """The end of an optimizer step: show the step before, and keep this one for the next time."""
        loss = self.accelerator.reduce(self.loss, "sum")
        self.loss = None
        now = time.monotonic()
        elapsed = max(now - self.last_step, 1e-9)
        self.speeds.append(self.images_in_step / elapsed)
        self.times.append((self.waited, elapsed))
        self.waited = 0.0
        self.last_step = now
        self._show()
        values = LaggedCopy(torch.stack([loss.float(), info.gradient_norm.float().to(loss.device)]))
        self.pending = (values, info, Progress(**vars(progress)))
        self.bar.update(1)

    def finish(self, progress: Progress) -> None:
        """Show and log the last step."""
        self._show()
        self.bar.close()

    def require_finite_losses(self) -> None:
        """UserError if the weights were moved by a loss that was NaN or infinite, the last step's included."""
        self._show()
        if self.not_finite is not None:
            raise UserError(
                f"the loss is not finite since step {self.not_finite}, so nothing is saved: lower the learning rate, "
                "or, if it was so from the start, use --no_half_vae, another --mixed_precision, or another model file"
            )

    def _show(self) -> None:
        if self.pending is None:
            return
        values, info, progress = self.pending
        self.pending = None
        loss, norm = values.read()
        self.recent.append(loss)
        if self.not_finite is None and not info.skipped and not math.isfinite(loss):
            self.not_finite = progress.step
        average = sum(self.recent) / len(self.recent)
        speed = statistics.median(self.speeds)  # unmoved by the steps after which something was painted or saved
        rate = max(info.rates.values())
        self.bar.set_postfix_str(
            f"loss {average:.4f}, lr {rate:.2e}, {speed:.1f} images/s, {used_memory()}", refresh=False
        )
        logs = {"loss/current": loss, "loss/average": average, "gradient_norm": norm, "images_per_second": speed}
        waited, elapsed = map(sum, zip(*self.times, strict=True))
        logs["waiting_for_data"] = waited / elapsed
        logs |= {f"lr/{name}": rate for name, rate in info.rates.items()}
        self.accelerator.log(logs, step=progress.step)

    def log_text(self, name: str, markdown: str) -> None:
        """A text about the whole run, to every tracker that shows texts."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_text(name, markdown)

    def log_pictures(self, pictures: dict[str, Image.Image], step: int) -> None:
        """Pictures by name, to every tracker that shows pictures."""
        arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}  # (1, H, W, 3)
        for tracker in self.accelerator.trackers:
            tracker.log_images(arrays, step=step, dataformats="NHWC")


def used_memory() -> str:
    """The most device memory this process has held, or without a GPU its own memory now."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GB"
