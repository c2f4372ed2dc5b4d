"""The processes and the device of a run."""

import os
import platform
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

from library import console
from library.models.family import Family
from library.options.base import Settings
from library.options.distributed import DistributedOptions
from library.options.logging import LogOptions
from library.options.model import ModelOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.rehearsal import RehearsalOptions
from library.options.saving import SaveOptions
from library.options.training import TrainingOptions
from library.training import together
from library.training.device import engines, precision
from library.training.device.hardware import settle_precision
from library.training.logs import Continued, run_folder
from library.training.trackers import tracker_names


def make_accelerator(
    settings: Settings, family: type[Family], continued: Continued | None = None
) -> tuple[Accelerator, precision.Precision]:
    """The processes and the device, with the precision that they can train in, and the log of a run that goes on."""
    folder = run_folder(settings[LogOptions], continued)
    wanted = settings[PrecisionOptions].mixed_precision
    distributed = settings[DistributedOptions]
    # accelerate must be told that there is nothing but the CPU: else two processes there never learn of each other
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    plugins = engines.plugins(distributed, settings[OptimizerOptions].clip_norm, wanted, cpu)
    state = PartialState(cpu, **connection(distributed, platform.system(), int(os.environ.get("WORLD_SIZE", "1"))))
    mixed = settle_precision(wanted, state.device)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with=tracker_names(settings[LogOptions]) or None,
        project_dir=folder,
        **plugins,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # they are constants here
                find_unused_parameters=family.leaves_layers_out(settings[ModelOptions].clip_skip),
                gradient_as_bucket_view=distributed.ddp_gradient_as_bucket_view,
                static_graph=static_graph(distributed, settings[TrainingOptions].gradient_accumulation_steps),
            )
        ],
    )
    # `accelerate launch` may set another number, by which every loss would be divided once more
    accelerator.gradient_accumulation_steps = 1
    together.connect()
    console.setup(folder / "messages.log" if folder and not settings[RehearsalOptions].dry_run else None)
    return accelerator, precision.choose(settings[PrecisionOptions], settings[SaveOptions], mixed)


def static_graph(options: DistributedOptions, accumulation: int) -> bool:
    """Whether DDP is promised a static graph; torch 2.13 fails where its first step accumulates gradients."""
    if options.ddp_static_graph and accumulation > 1:
        console.notice("--ddp_static_graph is left out: torch has no use for it with --gradient_accumulation_steps")
        return False
    return options.ddp_static_graph


def connection(options: DistributedOptions, system: str, processes: int) -> dict[str, Any]:
    """How `processes` find and hear each other, as arguments of torch's init_process_group."""
    if processes == 1:
        return {}
    arguments: dict[str, Any] = {}
    if options.ddp_timeout is not None:
        arguments["timeout"] = timedelta(minutes=options.ddp_timeout)
    if system == "Windows":
        # torch has neither NCCL nor libuv there
        os.environ["USE_LIBUV"] = "0"
        arguments["backend"] = "gloo"
    return arguments
