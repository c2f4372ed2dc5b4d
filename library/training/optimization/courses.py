"""Following the rates of a scheduler ahead of the run, and bringing it to where a run goes on."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import UserError

WALKED = 100_000
"""Further steps of a scheduler that has to be walked through are not looked at beforehand."""


class Spare(torch.optim.Optimizer):
    """Has as many groups as another optimizer has rates, with its settings, and moves nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Sequence[float]):
        super().__init__(
            [{"params": [nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates], dict(optimizer.defaults)
        )

    def step(self, closure: Any = None) -> None:
        pass


def course(scheduler: LRScheduler) -> Iterator[list[float]]:
    """The groups' rates in each step from where a scheduler is, which is to be a spare one."""
    if isinstance(scheduler, LambdaLR):
        for step in itertools.count(scheduler.last_epoch):
            yield rates_at(scheduler, step)
    while True:
        yield list(scheduler.get_last_lr())
        scheduler.step()


def sample(scheduler: LRScheduler, steps: int, most: int) -> dict[int, list[float]]:
    """The groups' rates in at most `most` of the next steps, by how far they are ahead. Of classes that have to be
    walked through these are the first ones, where the run is very long. The scheduler is to be a spare one.
    """
    if not isinstance(scheduler, LambdaLR):
        steps = min(steps, WALKED)
    number = min(most, steps)
    wanted = [round(one * (steps - 1) / max(number - 1, 1)) for one in range(number)]
    if isinstance(scheduler, LambdaLR):
        return {ahead: rates_at(scheduler, scheduler.last_epoch + ahead) for ahead in wanted}
    chosen = set(wanted)
    walk = zip(range(steps), course(scheduler), strict=False)
    return {ahead: rates for ahead, rates in walk if ahead in chosen}


def rates_at(scheduler: LambdaLR, step: int) -> list[float]:
    """The groups' rates in the step of this number, counted from 0."""
    return [base * curve(step) for base, curve in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]


def put_at(scheduler: LRScheduler, place: int) -> None:
    """Bring a spare scheduler from its first step to another, by the steps between them: what a class has added up on
    its way is then the same to the last bit.
    """
    if isinstance(scheduler, LambdaLR):
        rates = rates_at(scheduler, place)
        at_place = {"last_epoch": place, "_step_count": place + 1, "_last_lr": rates}
        scheduler.load_state_dict(scheduler.state_dict() | at_place)  # steps would take long to a far place
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # which a scheduler's state does not bring back
        return
    for _ in range(place):
        scheduler.step()


def take_over(scheduler: LRScheduler, other: LRScheduler) -> None:
    """Make a scheduler, and what it has set in its optimizer's groups, the same as a spare one of its kind."""
    if isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = other.lr_lambdas  # functions are not in its state
    scheduler.load_state_dict(copy.deepcopy(other.state_dict()))
    usual = other.optimizer.defaults
    for group, theirs in zip(scheduler.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        changed = {name for name, value in theirs.items() if name not in usual or usual[name] is not value}
        group |= {name: theirs[name] for name in (changed - {"params"}) | {"lr"}}


def require_rates(scheduler: LRScheduler, step: int, total_steps: int) -> None:
    """UserError if all rates are 0 from where a spare scheduler is, after that step, to the end of the run."""
    left = total_steps - step
    if left > 0 and not any(any(rates) for rates in itertools.islice(course(scheduler), left)):
        raise UserError(
            f"nothing is left to learn: the learning rate is 0 from step {step + 1} to the end, raise "
            "--max_train_steps or choose another --lr_scheduler"
        )
