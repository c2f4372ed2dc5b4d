"""From losses to changed weights: backward, clipping, scaling, the optimizer and its learning rates."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from library.data.plan import BatchPlan
from library.training import memory
from library.training.engines import whole
from library.training.optimizers import effective_rates


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did. Tensors stay on the device, so that asking for them does not stall it."""

    gradient_norm: Tensor  # before clipping, scalar
    skipped: bool  # fp16 gradients overflowed and the weights stayed as they were; the step counts all the same
    rates: dict[str, float]  # the learning rate each parameter group was moved with


class Stepper:
    """One backward pass per micro-batch, one optimizer step per step."""

    def __init__(
        self,
        accelerator: Accelerator,
        root: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        group_names: list[str],
        clip_norm: float | None,
    ):
        self.accelerator = accelerator
        self.root = root
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.group_names = group_names
        self.clip_norm = clip_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @contextlib.contextmanager
    def micro_step(self, plan: BatchPlan) -> Iterator[None]:
        """Around forward and backward of a micro-batch: processes exchange gradients in the last one of a step only.
        UserError if memory runs out.
        """
        sync = contextlib.nullcontext() if plan.last_micro else self.accelerator.no_sync(self.root)
        with memory.enough_for(memory.step_of(plan), memory.STEP_ADVICE), sync:
            yield

    def backward(self, losses: Tensor, plan: BatchPlan) -> None:
        """Accumulate gradients of the mean over all images of the step, wherever they are.

        `losses` (B,) are this micro-batch's. Engines average gradients over the processes, which the factor undoes.
        """
        self.accelerator.sync_gradients = plan.last_micro  # DeepSpeed moves the weights in the last backward pass
        self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / plan.images_in_step))

    def step(self) -> StepInfo:
        """Move the weights, then the learning rates. UserError if memory runs out."""
        with memory.enough_for("what the optimizer keeps", memory.STEP_ADVICE):
            return self._step()

    def _step(self) -> StepInfo:
        rates = effective_rates(self.optimizer.optimizer, self.scheduler.get_last_lr())
        named = dict(zip(self.group_names, rates, strict=True))
        # an infinite limit measures the norm and clips nothing
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if norm is None:  # DeepSpeed does not tell
            norm = torch.zeros(())
        return StepInfo(whole(torch.as_tensor(norm).detach()), bool(self.optimizer.step_was_skipped), named)
