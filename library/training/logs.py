"""The log of a run: its folder, and the trackers that write there."""

import glob
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from library import console
from library.errors import UserError
from library.options.base import Settings
from library.options.logging import LogOptions
from library.training.resuming.state import Progress
from library.training.trackers import public_config, read_tracker_config, wandb_arguments

Continued = dict[str, Any]
"""What the state of a run knows of its log: `folder`, its name in --logging_dir, and `wandb_id`; either may be None."""

_ROOM = 2**20  # bytes without which a log that had to stop is not gone on with
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def run_folder(options: LogOptions, continued: Continued | None = None) -> Path | None:
    """`<logging_dir>/<log_prefix><YYYYmmddHHMMSS>`, that of the run which is resumed; None without --logging_dir."""
    if options.logging_dir is None:
        return None
    root = Path(options.logging_dir)
    if continued and continued["folder"]:
        folder = root / continued["folder"]
        if folder.is_dir():
            return folder
        console.notice(f"{folder}: the log of the resumed run is not there, a new one begins")
    name = f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    taken = len(list(root.glob(f"{glob.escape(name)}*")))  # by a run of the same second
    return root / (f"{name}_{taken + 1}" if taken else name)


def open_log(
    settings: Settings,
    name: str,
    accelerator: Accelerator,
    progress: Progress,
    continued: Continued | None = None,
) -> Continued:
    """Start the trackers that `accelerator` was made with, `name` being the training method's, and say what a resumed
    run must know of them.

    A resumed run goes on where `progress` is: the events of later steps count no longer. Raises UserError for what a
    tracker refuses.
    """
    options = settings[LogOptions]
    folder = Path(accelerator.logging_dir) if options.logging_dir else None
    wanted = read_tracker_config(options)
    name = options.log_tracker_name or name
    goes_on = continued is not None and folder is not None and folder.name == continued["folder"]
    arguments: dict[str, dict[str, Any]] = {"tensorboard": dict(wanted.get("tensorboard", {}))}
    if goes_on:
        arguments["tensorboard"]["purge_step"] = progress.step + 1
        if accelerator.is_main_process:
            _wait_for_a_later_name(folder / name)
    run_id = None
    if "wandb" in options.trackers:
        known = (continued or {}).get("wandb_id")
        run_id = wanted.get("wandb", {}).get("id") or known or secrets.token_hex(4)
        arguments["wandb"] = wandb_arguments(options, wanted.get("wandb", {}), folder, run_id)
    config = public_config(settings) if options.log_config else None
    if accelerator.is_main_process:
        _start(options, name, accelerator, arguments, config)
    return {"folder": folder and folder.name, "wandb_id": run_id}


def _start(
    options: LogOptions,
    name: str,
    accelerator: Accelerator,
    arguments: dict[str, dict[str, Any]],
    config: dict[str, Any] | None,
) -> None:
    refusals: tuple[type[Exception], ...] = ()
    if "wandb" in options.trackers:
        with console.quiet_dependencies():
            import wandb

        refusals = (wandb.Error,)
        if options.wandb_api_key:
            os.environ["WANDB_API_KEY"] = options.wandb_api_key
        _require_key(wandb, arguments["wandb"])
    threading.excepthook = _but_for_logs
    try:
        with console.quiet_dependencies():
            accelerator.init_trackers(name, config=config, init_kwargs=arguments)
    except OSError as problem:
        raise UserError(
            f"--logging_dir: {accelerator.logging_dir} cannot be written to ({problem.strerror}): free some space or "
            "name another folder"
        ) from None
    except refusals as problem:
        raise UserError(f"Weights & Biases cannot log this run: {str(problem).splitlines()[0]}") from None
    except TypeError as problem:
        if not options.log_tracker_config:
            raise
        raise UserError(f"{options.log_tracker_config}: a tracker does not know a setting ({problem})") from None
    if "wandb" in options.trackers:
        run = accelerator.get_tracker("wandb", unwrap=True)
        place = f"{Path(run.dir).parent}, send it with `wandb sync`" if run.offline else run.url
        console.notice(f"logging to Weights & Biases: {place}")


def _but_for_logs(problem: threading.ExceptHookArgs) -> None:
    """Threads that write a log tell whoever logs next that the disk is full, and need not print it."""
    if not (isinstance(problem.exc_value, OSError) and type(problem.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(problem)


def _require_key(wandb: Any, arguments: dict[str, Any]) -> None:
    """UserError if there is none where one is needed: Weights & Biases would ask for it and wait."""
    mode = arguments.get("mode") or wandb.setup().settings.mode
    if mode not in ("offline", "disabled", "dryrun") and not wandb.api.api_key:
        raise UserError(
            "Weights & Biases needs your key: run `wandb login` once or set WANDB_API_KEY, or set WANDB_MODE=offline "
            "to log to this machine only"
        )


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files in the order of their names, which have the second in them and then the process."""
    seconds = [int(match[1]) for path in folder.glob("events.*") if (match := _EVENTS.match(path.name))]
    newest = max(seconds, default=0)
    for _ in range(40):
        if int(time.time()) > newest:
            break
        time.sleep(0.05)


class Log:
    """What the trackers of a run are told. While the disk of one is full, it is left out; later a new file goes on."""

    def __init__(self, accelerator: Accelerator):
        self.trackers = accelerator.trackers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def text(self, name: str, markdown: str) -> None:
        """A text about the whole run, where texts are shown."""
        self._each(lambda tracker: tracker.writer.add_text(name, markdown) if _is_tensorboard(tracker) else None)

    def pictures(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Pictures by name."""
        arrays = {name: np.asarray(picture)[None] for name, picture in pictures.items()}  # (1, H, W, 3)

        def show(tracker: GeneralTracker) -> None:
            tracker.log_images(arrays, step=step, **({"dataformats": "NHWC"} if _is_tensorboard(tracker) else {}))

        self._each(show)

    def flush(self) -> None:
        """Let everything reach the disk."""
        self._each(lambda tracker: tracker.writer.flush() if _is_tensorboard(tracker) else None)

    def close(self) -> None:
        """The run is over; accelerate has no trackers left to close."""
        self._each(lambda tracker: tracker.finish())
        self.trackers.clear()

    def _each(self, tell: Callable[[GeneralTracker], None]) -> None:
        for tracker in self.trackers:
            if _has_failed(tracker) and shutil.disk_usage(tracker.writer.log_dir).free < _ROOM:
                continue
            try:
                tell(tracker)
            except OSError as problem:
                why = problem.strerror or problem
                console.warn(f"the log cannot be written ({why}): the training goes on without it")
                if _is_tensorboard(tracker):  # its thread has died; the next thing told begins a new file
                    tracker.writer.file_writer = tracker.writer.all_writers = None


def _is_tensorboard(tracker: GeneralTracker) -> bool:
    return tracker.name == "tensorboard"


def _has_failed(tracker: GeneralTracker) -> bool:
    return _is_tensorboard(tracker) and tracker.writer.file_writer is None
