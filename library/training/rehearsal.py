"""Before the first step: does the largest one fit into memory, and can pictures and files be made? What takes too much
shows now and not hours later; afterwards everything is as it was.
"""

import contextlib
import copy
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from library import console
from library.data.dataset import ImageDataset
from library.data.plan import BatchPlan
from library.errors import UserError
from library.generation.paint import evaluating, paint
from library.options.ema import EmaOptions
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.training import together
from library.training.device import engines, memory
from library.training.device.placement import on_device
from library.training.ema import Ema
from library.training.methods.base import Method
from library.training.motion import Motion
from library.training.optimization.optimizers import forget_steps, tensors_in
from library.training.outlook import Outlook
from library.training.previews import with_seed
from library.training.provenance import Provenance
from library.training.published import published_weights
from library.training.resuming.packing import raw
from library.training.saving import check_range
from library.training.step import TrainingStep
from library.training.validation import untouched_generators

_WORTH_A_WORD = 2.0  # seconds
_PREVIEW_STEPS = 2  # the fewest that every sampler takes


def rehearse(run: Outlook, method: Method, step: TrainingStep, motion: Motion, dataset: ImageDataset) -> None:
    """Try the step with the most pixels, a preview and a save, in all processes. To be called while the optimizer is
    new. UserError if memory runs out, or a file cannot be written.
    """
    started = time.monotonic()
    plan = replace(run.plan.largest_batch(), step=run.progress.step)  # what has stopped by then needs no gradients
    done = ["a save"]
    # which keeps weights and steps of its own that nobody can put back
    takes_step = engines.engine(run.accelerator) != "deepspeed"
    kept = _optimizer_as_new(motion, run.accelerator.scaler) if takes_step else contextlib.nullcontext()
    with untouched_generators(run.accelerator.device), kept:
        # it lasts as long as the run, so its memory counts
        ema = Ema(step.trained, 0.0) if run.settings[EmaOptions].ema else None
        if takes_step:
            done.insert(0, memory.step_of(plan))
            with _kept(step.trained), evaluating(motion.root):
                _take_step(run, method, motion, dataset, plan)
            step.forget()
        with engines.first_looks(step) as first:
            if first:
                with published_weights(method, motion.optimizer, step.trained):
                    if run.plans.prompts:
                        done.insert(-1, "a preview")
                        _paint(run, step)
                    _save(run, method, step, motion, ema)
        _look_at_disk(run, step, motion, ema)
    took = time.monotonic() - started
    if took > _WORTH_A_WORD:
        console.notice(f"rehearsed {', '.join(done)} in {took:.0f} s: memory suffices")


def _take_step(run: Outlook, method: Method, motion: Motion, dataset: ImageDataset, plan: BatchPlan) -> None:
    """A step as it is later in the run: the optimizer has its state, and gradients wait if micro-batches add up."""
    with memory.enough_for("what the optimizer keeps", memory.STEP_ADVICE):
        motion.stepper.make_state()
        if run.plan.accumulation > 1:
            motion.stepper.fill_gradients()
    batch = dataset[plan]
    motion.root.train()
    method.on_micro_step(batch)
    with motion.stepper.micro_step(plan):
        losses = motion.root(batch.to(run.accelerator.device))
        motion.stepper.backward(losses, plan)
    method.before_step()
    motion.stepper.step()
    method.after_step(run.progress.step + 1)
    method.rehearsed()


def _paint(run: Outlook, step: TrainingStep) -> None:
    """The largest of the previews, as far as memory counts."""
    size = run.info.latents.default_size
    prompts = [with_seed(prompt, number) for number, prompt in enumerate(run.plans.prompts)]
    largest = max(prompts, key=lambda prompt: (prompt.width or size) * (prompt.height or size))
    request = replace(largest, sample_steps=_PREVIEW_STEPS)
    with (
        memory.enough_for("a preview", memory.PICTURE_ADVICE),
        evaluating(step.trained),
        on_device(step.model, run.accelerator.device),
    ):
        paint(step.model, request, default_sampler=run.settings[PreviewOptions].sample_sampler)


def _save(run: Outlook, method: Method, step: TrainingStep, motion: Motion, ema: Ema | None) -> None:
    """What is saved at once, in a folder that is taken for unfinished and cleaned up wherever this is killed."""
    check_range(method.saved(step.model, step.trained), run.formats.saved, "before the first step")
    folder = run.target.with_name(f"{run.target.name}.{os.getpid()}.tmp")
    metadata = Provenance(run, method, step.model, motion.optimizer)(run.progress)
    try:
        folder.mkdir(exist_ok=True)
        method.save(folder / run.target.name, run.formats.saved, metadata)
        if ema is not None:
            with ema.swapped():
                method.save(folder / f"{run.target.name}-ema", run.formats.saved, metadata)
    except (OSError, UserError) as problem:
        raise UserError(
            f"what is trained could not be saved in {run.target.parent}, as was tried before the first step "
            f"({problem}): make room there, or choose another --output_dir"
        ) from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _look_at_disk(run: Outlook, step: TrainingStep, motion: Motion, ema: Ema | None) -> None:
    """A warning if no state would fit on the disk, where states are to be saved."""
    options = run.settings[SaveOptions]
    if not (options.save_state or options.save_state_on_train_end):
        return
    kept = [raw(step.trained), motion.optimizer.state, ema.averages if ema else []]
    needed = sum(engines.local(tensor).nbytes for tensor in tensors_in(kept))
    if engines.spreads(run.accelerator):
        needed = sum(together.gather(needed))
    free = shutil.disk_usage(run.target.parent).free
    if free < needed:
        console.warn(
            f"{run.target.parent} has {free / 2**30:.1f} GB free and a state of this run takes {needed / 2**30:.1f} "
            "GB: make room, or no state can be saved"
        )


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Its parameters and buffers are afterwards what they were, bit for bit; the copy is not on the device."""
    own = [engines.local(tensor.detach()).to("cpu", copy=True) for tensor in (*module.parameters(), *module.buffers())]
    yield
    for tensor, before in zip((*module.parameters(), *module.buffers()), own, strict=True):
        engines.local(tensor.detach()).copy_(before)


@contextlib.contextmanager
def _optimizer_as_new(motion: Motion, scaler: torch.amp.GradScaler | None) -> Iterator[None]:
    """Afterwards the optimizer knows of no step, nor do the learning rates and the scale of fp16 losses; no gradients
    are left.
    """
    optimizer = motion.optimizer
    attributes, rates = dict(vars(optimizer)), copy.deepcopy(motion.scheduler.state_dict())
    groups = [
        {name: value if name == "params" else copy.deepcopy(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    scale = scaler.state_dict() if scaler else {}
    if scale:
        scaler.load_state_dict({**scale, "scale": 1.0})  # with its first scale many a model's first steps are skipped
    yield
    motion.root.zero_grad(set_to_none=True)
    vars(optimizer).clear()
    vars(optimizer).update(attributes)
    forget_steps(optimizer)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)
    motion.scheduler.load_state_dict(rates)
    if scale:
        scaler.load_state_dict(scale)
