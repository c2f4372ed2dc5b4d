"""Courses of the learning rate, and two weights that follow one."""

import json

import torch
from torch import nn

from library.options import SchedulerOptions, options_of
from library.options.scheduler import LR_SCHEDULERS
from library.training.optimization.optimizers import effective_rates, load_optimizer
from library.training.optimization.schedulers import make_scheduler, planned
from library.training.resuming.packing import pack, unpack
from library.training.resuming.resume import restore_scheduler

RATES = (0.01, 0.002)


def options(**values: object) -> SchedulerOptions:
    """Flags without their `lr_scheduler_`."""
    names = {option.name for option in options_of(SchedulerOptions)}
    return SchedulerOptions(
        **{name if name in names else f"lr_scheduler_{name}": value for name, value in values.items()}
    )


NAMED = [
    options(lr_scheduler=name, lr_warmup_steps=3, lr_decay_steps=0.4, **more)
    for name, more in {
        **{name: {} for name in LR_SCHEDULERS if name != "adafactor"},
        "cosine_with_restarts": {"num_cycles": 3},
        "cosine_with_min_lr": {"min_lr_ratio": 0.1},
        "polynomial": {"power": 2},
        "piecewise_constant": {"args": ("step_rules=1:4,.5:7,1e-1",)},
    }.items()
]
CLASSES = [
    options(type="CosineAnnealingLR"),
    options(type="steplr", args=("step_size=3", "gamma=0.5")),
    options(type="OneCycleLR"),
    options(type="torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", args=("T_0=4", "T_mult=2")),
    options(type="CyclicLR", args=("base_lr=0.001", "max_lr=0.1", "step_size_up=3", "mode=exp_range", "gamma=0.9")),
    options(type="MultiStepLR", args=("milestones=[2,7]",)),
    options(type="ExponentialLR", args=("gamma=0.7",)),
]


class Run:
    """Two weights with rates of their own, moved over some steps."""

    def __init__(self, chosen: SchedulerOptions, total: int, kind: type = torch.optim.AdamW, **settings: object):
        torch.manual_seed(0)
        self.chosen, self.total = chosen, total
        self.weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))]
        groups = [{"params": [weight], "lr": rate} for weight, rate in zip(self.weights, RATES, strict=True)]
        self.optimizer = kind(groups, **settings)
        self.scheduler = make_scheduler(chosen, self.optimizer, total)
        self.rates: list[list[float]] = []

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            assert self.scheduler.get_last_lr() == [group["lr"] for group in self.optimizer.param_groups]
            self.rates.append(effective_rates(self.optimizer, self.scheduler.get_last_lr()))
            generator = torch.Generator().manual_seed(self.scheduler.last_epoch)
            for weight in self.weights:
                weight.grad = weight.detach() + torch.randn(weight.shape, generator=generator)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def resumed(self, total: int | None = None) -> "Run":
        """Another that goes on from what a state keeps."""
        tensors = {}
        packed = json.loads(json.dumps(pack([self.optimizer.state_dict(), self.scheduler.state_dict()], tensors)))
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        optimizer, scheduler = unpack(packed, tensors)
        other = Run(self.chosen, total or self.total)
        for weight, value in zip(other.weights, self.weights, strict=True):
            weight.data.copy_(value.data)
        load_optimizer(other.optimizer, optimizer)
        rates = [group["asked_rate"] for group in other.optimizer.param_groups]
        ahead = planned(self.chosen, other.optimizer, rates, other.total)
        restore_scheduler(other.scheduler, ahead, scheduler["last_epoch"], scheduler)
        return other
