"""Which stepper a run has, and with what it cannot have it."""

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError
from library.options.base import Settings
from library.options.memory import MemoryOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.training.device import engines
from library.training.methods.base import Method, ParameterGroup
from library.training.optimization.fused import FusedStepper
from library.training.optimization.optimizers import import_optimizer
from library.training.optimization.parts import can_be_split
from library.training.optimization.stepper import HalfStepper, Stepper

if TYPE_CHECKING:
    from library.training.outlook import Outlook


def check_stepper(settings: Settings, accelerator: Accelerator) -> None:
    """UserError for what flags ask of the step that cannot be had in these processes or with this optimizer."""
    network = settings.groups.get(NetworkOptions)
    spread = {
        settings[PrecisionOptions].full: "rounds the weights of each process",
        settings[MemoryOptions].fused: "steps within the backward pass",
        "--scale_weight_norms" if network and network.scale_weight_norms else None: "measures whole weights",
    }
    spread.pop(None, None)
    if engines.spreads(accelerator) and spread:
        flag, why = next(iter(spread.items()))
        raise UserError(f"{flag} {why}, which FSDP and DeepSpeed keep to themselves: leave one of them out")
    kind = import_optimizer(settings[OptimizerOptions])
    if network and network.scale_weight_norms and hasattr(kind, "train"):
        raise UserError(
            f"--scale_weight_norms scales the weights that steps are taken from, and {kind.__name__} saves an average "
            "of them, which it does not: drop the flag, or use another --optimizer_type"
        )
    fused = settings[MemoryOptions].fused
    if fused is None:
        return
    if accelerator.num_processes > 1:
        raise UserError(
            f"{fused} leaves no time for {accelerator.num_processes} processes to exchange gradients: drop it, or "
            "train in one process"
        )
    if not can_be_split(kind):
        raise UserError(
            f"{fused}: {kind.__name__} is not known to treat every weight by itself, so it needs all gradients at "
            "once: drop the flag, or use another --optimizer_type"
        )


def make_stepper(
    run: "Outlook",
    method: Method,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    groups: list[ParameterGroup],
) -> Stepper:
    """The one that the flags ask for; `root` and `optimizer` are as the engine runs them. UserError where the method
    cannot have that one.
    """
    options = run.settings[MemoryOptions]
    if options.fused and method.reads_gradients():
        raise UserError(
            f"{options.fused}: this network looks at all gradients before a step (update_grad_norms), when most are "
            "freed: drop the flag"
        )
    arguments = (
        run.accelerator,
        root,
        optimizer,
        scheduler,
        groups,
        run.settings[OptimizerOptions].clip_norm,
    )
    if options.fused is not None:
        return FusedStepper(*arguments, seed=run.seed, sets=options.fused_optimizer_groups)
    if run.formats.trained != torch.float32:
        return HalfStepper(*arguments, seed=run.seed)
    return Stepper(*arguments)
