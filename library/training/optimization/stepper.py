"""From losses to changed weights: backward, clipping, scaling, the optimizer and its learning rates."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from library.data.plan import BatchPlan
from library.training.device import memory
from library.training.device.engines import whole
from library.training.methods.base import ParameterGroup
from library.training.optimization.optimizers import effective_rates
from library.training.optimization.parts import Parts
from library.training.optimization.rounding import Rounding

_TINY = 1e-7  # not 0 in fp16 either


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
        groups: list[ParameterGroup],
        clip_norm: float | None,
    ):
        self.accelerator = accelerator
        self.root = root
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.groups = groups
        self.clip_norm = clip_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.number = 0  # of the step under way, as in its plan
        self.rates: dict[str, float] = {}

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
        if plan.last_micro:
            self.number = plan.step
            rates = effective_rates(self.optimizer.optimizer, self.scheduler.get_last_lr())
            self.rates = {
                group.name: rate if group.trained_in(plan.step) else 0.0
                for group, rate in zip(self.groups, rates, strict=True)
            }
        self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / plan.images_in_step))

    def step(self) -> StepInfo:
        """Move the weights, then the learning rates. UserError if memory runs out."""
        with memory.enough_for("what the optimizer keeps", memory.STEP_ADVICE):
            return self._step()

    def _step(self) -> StepInfo:
        norm, skipped = self._move()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(whole(norm.detach()), skipped, self.rates)

    def _move(self) -> tuple[Tensor, bool]:
        """Move the weights. Returns the norm of the gradients before they are clipped, and whether it was skipped."""
        # an infinite limit measures the norm and clips nothing
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        # DeepSpeed does not tell
        return torch.zeros(()) if norm is None else torch.as_tensor(norm), bool(self.optimizer.step_was_skipped)

    def make_state(self) -> None:
        """Let the optimizer make what it keeps of every parameter, by a step on tiny gradients; none are left."""
        self.fill_gradients()
        self.optimizer.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fill_gradients(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Give these parameters, or all, tiny gradients: for 0 some optimizers keep no state."""
        for parameter in self.parameters if parameters is None else parameters:
            parameter.grad = torch.full_like(parameter, _TINY)


class HalfStepper(Stepper):
    """For trained weights in half precision: the optimizer sees a part of them at a time in float32, and what it makes
    of them is rounded stochastically.

    Where losses are scaled, as for fp16, gradients are unscaled in float32, too: in fp16 most would be too small, and
    torch's GradScaler refuses them.
    """

    def __init__(self, *arguments, seed: int):
        super().__init__(*arguments)
        self.parts = Parts(self.optimizer.optimizer, Rounding(seed))
        self.divided = self.parts.divided()

    def _move(self) -> tuple[Tensor, bool]:
        norm = gradient_norm(self.parameters)
        scaler, scale = self.accelerator.scaler, None
        if scaler is not None:
            scale = scaler.scale(torch.ones_like(norm))
            norm = norm / scale
            if self._overflowed(scaler, norm):
                return norm, True
        factor = clip_factor(norm, self.clip_norm)
        if scale is not None:
            factor = 1 / scale if factor is None else factor / scale
        for part in self.divided:
            self.parts.take(part, self.number, factor)
        self.parts.end()
        return norm, False

    def _overflowed(self, scaler: torch.amp.GradScaler, norm: Tensor) -> bool:
        """Whether this step has to be left out; the scale of the next ones follows from it, as GradScaler decides."""
        infinite = (~norm.isfinite()).float()
        state = scaler._per_optimizer_states[id(self.optimizer.optimizer)]  # what `unscale_` would put there
        state["found_inf_per_device"] = {norm.device: infinite}
        scaler.update()
        return bool(infinite)  # waits for the device, as GradScaler does: the optimizer must not see such gradients

    def make_state(self) -> None:
        for part in self.divided:
            self.fill_gradients(part)
            self.parts.take(part, self.number)
        self.parts.end()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all their gradients, scalar, float32; computed in float32 from half precision."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


def clip_factor(norm: Tensor, limit: float | None) -> Tensor | None:
    """What gradients of this norm are multiplied with so that it is at most `limit`, as in torch's clip_grad_norm_."""
    return None if limit is None else (limit / (norm + 1e-6)).clamp_max(1.0)
