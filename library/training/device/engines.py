"""What runs the root module: one process, several with a copy each (DDP), or FSDP and DeepSpeed, which spread it.

The engines are accelerate's; here is what they need to know of a run, and how to see whole weights under each.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from library import console
from library.errors import UserError
from library.options.distributed import DistributedOptions
from library.training import together
from library.training.methods.base import ParameterGroup

_NAMES = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def engine(accelerator: Accelerator) -> str:
    """ "single", "ddp", "fsdp" or "deepspeed"."""
    return _NAMES.get(accelerator.distributed_type) or ("ddp" if accelerator.num_processes > 1 else "single")


def spreads(accelerator: Accelerator) -> bool:
    """Whether no process has all of the trained weights."""
    return engine(accelerator) in ("fsdp", "deepspeed")


def plugins(options: DistributedOptions, clip_norm: float | None, mixed: str, cpu: bool) -> dict[str, Any]:
    """What Accelerator is told of the engine that flags or `accelerate launch` ask for. To be called before the
    processes know each other. UserError for one that cannot run here.
    """
    if options.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return {"deepspeed_plugin": _deepspeed(options, clip_norm, mixed, cpu)}
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return {"fsdp_plugin": _fsdp()}
    return {}


def check_stops(accelerator: Accelerator) -> None:
    """UserError where no part of what is trained can stop before the others."""
    if engine(accelerator) == "deepspeed":
        raise UserError(
            "--stop_text_encoder_training: DeepSpeed moves all weights in every step, with or without gradients: leave "
            "one of them out"
        )


def deepspeed_arguments(options: DistributedOptions, clip_norm: float | None) -> dict[str, Any]:
    """The flags as arguments of accelerate's DeepSpeedPlugin.

    Gradients of micro-batches are weighted and added up here, so DeepSpeed is told that every step has one.
    """
    return {
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,  # None would stand for accelerate's own, 1
        "zero_stage": options.zero_stage,
        "offload_optimizer_device": options.optimizer_device,
        "offload_optimizer_nvme_path": options.offload_optimizer_nvme_path,
        "offload_param_device": options.param_device,
        "offload_param_nvme_path": options.offload_param_nvme_path,
        "zero3_init_flag": options.zero3_init_flag and options.zero_stage == 3,
        "zero3_save_16bit_model": options.zero3_save_16bit_model and options.zero_stage == 3,
    }


def deepspeed_changes(options: DistributedOptions, mixed: str) -> dict[str, Any]:
    """What DeepSpeed's configuration has to say besides, where no argument of the plugin says it."""
    # only used to report a throughput, which is not shown
    changes: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
    if options.fp16_master_weights_and_gradients:
        if mixed != "fp16":
            raise UserError("--fp16_master_weights_and_gradients works with --mixed_precision fp16 only")
        changes["fp16"] = {"enabled": True, "auto_cast": True, "fp16_master_weights_and_gradients": True}
    return changes


def _deepspeed(options: DistributedOptions, clip_norm: float | None, mixed: str, cpu: bool) -> DeepSpeedPlugin:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install deepspeed, or train without --deepspeed")
    if cpu:
        raise UserError("DeepSpeed needs a GPU: train without --deepspeed on this machine")
    arguments = deepspeed_arguments(options, clip_norm)
    if not options.deepspeed:  # `accelerate launch` says the rest
        arguments = {name: arguments[name] for name in ("gradient_accumulation_steps", "gradient_clipping")}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # accelerate asks for this before it is given the plugin
    plugin = DeepSpeedPlugin(**arguments)
    if plugin.zero_stage == 3:
        # nothing gathers its weights where they are saved and painted with
        raise UserError(
            "--zero_stage 3 is not available: spread the weights with FSDP, see docs/several_gpus.md, or use "
            "--zero_stage 2"
        )
    plugin.deepspeed_config |= deepspeed_changes(options, mixed)
    return plugin


def _fsdp() -> FullyShardedDataParallelPlugin:
    """As `accelerate launch` configures it, but for what the run decides itself: precision and what is loaded where."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP version 1 cannot train a part of a model: use version 2, as accelerate launch --fsdp_version 2 or "
            "`fsdp_version: 2` in the file of accelerate config"
        )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )


def prepare(
    accelerator: Accelerator, step: nn.Module, optimizer: torch.optim.Optimizer, groups: list[ParameterGroup]
) -> tuple[nn.Module, AcceleratedOptimizer, list[ParameterGroup]]:
    """The root module and the optimizer as the engine runs them, and the groups with the parameters that it moves:
    FSDP puts others in their place.
    """
    if engine(accelerator) == "fsdp":
        step.forward = accelerator.autocast()(step.forward)  # as accelerate does under the other engines
    if any(group.steps is not None for group in groups):
        _expect_changes(accelerator.ddp_handler)
    together.wait()  # some may have loaded and cached faster, and what follows has little patience
    root, prepared = accelerator.prepare(step, optimizer)
    if engine(accelerator) == "fsdp":
        moved = [list(group["params"]) for group in optimizer.param_groups]
        groups = [replace(group, parameters=own) for group, own in zip(groups, moved, strict=True)]
    return root, prepared, groups


def _expect_changes(ddp: DistributedDataParallelKwargs) -> None:
    """Have DDP look in every step for what gets no gradients."""
    ddp.find_unused_parameters = True
    if ddp.static_graph:
        console.notice("--ddp_static_graph is left out: --stop_text_encoder_training changes the graph")
        ddp.static_graph = False


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over processes; the tensor itself if it is not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes. All processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def first_looks(root: nn.Module) -> Iterator[bool]:
    """All processes enter this; it is true in the first one, where every weight of the prepared `root` is whole and its
    modules may be called outside of training. The others wait until the first one leaves.
    """
    first = together.is_first()
    with whole_weights(root, keep=first):
        yield first
        together.wait()


@contextlib.contextmanager
@torch.no_grad()
def whole_weights(root: nn.Module, keep: bool = True) -> Iterator[None]:
    """While it lasts, the parameters of `root` are plain tensors with all their values, and calling its modules talks
    to no other process. What is done to these tensors is forgotten.

    All processes have to enter it; those that do not `keep` the weights only pass theirs on.
    """
    spread = [
        (module, name, parameter)
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(parameter, DTensor)
    ]
    gathered: dict[DTensor, nn.Parameter] = {}
    for module, name, parameter in spread:
        if parameter not in gathered:
            full = parameter.detach().full_tensor()
            gathered[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad) if keep else parameter
        module.register_parameter(name, gathered[parameter])
    try:
        with _plain(root):
            yield
    finally:
        for module, name, parameter in spread:
            module.register_parameter(name, parameter)


@contextlib.contextmanager
def _plain(root: nn.Module) -> Iterator[None]:
    """FSDP gathers and spreads weights around the forward of each module it has wrapped, and has its own way to move
    it: not while this lasts.
    """
    kept = []
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state, hooks = fully_shard.state(module), (module._forward_pre_hooks, module._forward_hooks)
            kept.append((module, type(module), [(own, dict(own)) for own in hooks]))
            for own, handle in zip(
                hooks, (state._pre_forward_hook_handle, state._post_forward_hook_handle), strict=True
            ):
                own.pop(handle.id, None)
            module.__class__ = type(module).__bases__[1]  # (FSDPModule, what it was)
    try:
        yield
    finally:
        for module, kind, hooks in kept:
            module.__class__ = kind
            for own, before in hooks:
                own.clear()
                own.update(before)


def save_engine(accelerator: Accelerator, folder: Path) -> None:
    """Write what FSDP or DeepSpeed holds of the trained weights and of the optimizer's state: all processes, each its
    part. UserError in all of them if the disk does not take that of one.
    """
    if engine(accelerator) == "fsdp":
        weights, optimizer = get_state_dict(*_prepared(accelerator), options=_TRAINED)
        problem = None
        try:
            checkpoint.save({"weights": weights, "optimizer": optimizer}, checkpoint_id=folder)
        except checkpoint.CheckpointException as error:  # no Exception, and a traceback of each process as its text
            problem = _reason(error)
        problem = next(filter(None, together.gather(problem)), None)
        if problem is not None:
            raise UserError(f"{folder} cannot be written: {problem}")
    else:
        accelerator.save_state(str(folder), exclude_frozen_parameters=True)


def _reason(error: checkpoint.CheckpointException) -> str:
    """Why it failed in the first process that says so, in one line."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    cause = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    return " ".join(str(getattr(cause, "strerror", None) or cause).split()) or type(cause).__name__


def load_engine(accelerator: Accelerator, folder: Path) -> None:
    """Read what `save_engine` wrote: all processes, as many as there were."""
    if engine(accelerator) == "fsdp":
        model, optimizer = _prepared(accelerator)
        weights, state = get_state_dict(model, optimizer, options=_TRAINED)
        checkpoint.load({"weights": weights, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=_TRAINED)
    else:
        accelerator.load_state(str(folder), load_module_strict=False)


def _prepared(accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    return accelerator._models[0], accelerator._optimizers[0].optimizer
