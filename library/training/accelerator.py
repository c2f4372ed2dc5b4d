"""The processes and the device of a run."""

import time

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from library import console
from library.models.family import Family
from library.options.base import Settings
from library.options.logging import LogOptions
from library.options.model import ModelOptions
from library.options.precision import PrecisionOptions
from library.options.saving import SaveOptions
from library.training import precision, tracking
from library.training.hardware import settle_precision


def make_accelerator(settings: Settings, family: type[Family]) -> tuple[Accelerator, precision.Precision]:
    """The processes and the device, with the precision that they can train in."""
    folder = tracking.log_folder(settings[LogOptions], time.localtime())
    wanted = settings[PrecisionOptions].mixed_precision
    # accelerate must be told that there is nothing but the CPU: else two processes there never learn of each other
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    mixed = settle_precision(wanted, PartialState(cpu).device)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with="tensorboard" if folder else None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # they are constants here
                find_unused_parameters=family.leaves_layers_out(settings[ModelOptions].clip_skip),
            )
        ],
    )
    console.setup(folder and folder / "messages.log")
    return accelerator, precision.choose(settings[PrecisionOptions], settings[SaveOptions], mixed)
