"""The learning rate over time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from library.errors import UserError, suggest
from library.options.base import option, parse_key_values


class Course(NamedTuple):
    """What a course of the learning rate by name listens to."""

    flags: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # of --lr_scheduler_args


_WARMUP, _CYCLES, _LOWEST = "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"
LR_SCHEDULERS = {
    "constant": Course(),
    "constant_with_warmup": Course((_WARMUP,)),
    "linear": Course((_WARMUP,)),
    "cosine": Course((_WARMUP,), ("num_cycles",)),
    "cosine_with_restarts": Course((_WARMUP, _CYCLES)),
    "cosine_with_min_lr": Course((_WARMUP, _CYCLES, _LOWEST), ("min_lr",)),
    "polynomial": Course((_WARMUP, "lr_scheduler_power"), ("lr_end",)),
    "inverse_sqrt": Course((_WARMUP, "lr_scheduler_timescale")),
    "warmup_stable_decay": Course((_WARMUP, "lr_decay_steps", _CYCLES, _LOWEST), ("warmup_type", "decay_type")),
    "piecewise_constant": Course((), ("step_rules",)),
    "adafactor": Course(),
}
_NUMBER = r"\s*(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*"
_RULES = re.compile(rf"({_NUMBER}:\s*\d+\s*,)*{_NUMBER}", re.IGNORECASE)


@dataclass(frozen=True)
class SchedulerOptions:
    """The course of the learning rate over a run."""

    title: ClassVar[str] = "learning rate over time"

    lr_scheduler: str = option(
        "constant", f"course of the learning rate, one of: {', '.join(LR_SCHEDULERS)}", metavar="NAME"
    )
    lr_scheduler_type: str = option(
        "",
        "instead of --lr_scheduler: a class of torch.optim.lr_scheduler, or module.Class of an installed package",
        metavar="CLASS",
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        None,
        "further arguments of the scheduler, such as T_0=100 of CosineAnnealingWarmRestarts, or "
        "step_rules=1:100,0.1:200,0.01 of piecewise_constant: the factor up to a step, and the last one's",
        metavar="NAME=VALUE",
    )
    lr_warmup_steps: int | float = option(
        0,
        "steps in which the rate rises from 0, as a number or as a part of all steps (0.1 or 10%); for all courses "
        "but constant, piecewise_constant and adafactor",
        metavar="N",
        minimum=0,
    )
    lr_decay_steps: int | float = option(
        0,
        "steps at the end in which the rate falls, as a number or as a part of all steps; for warmup_stable_decay",
        metavar="N",
        minimum=0,
    )
    lr_scheduler_num_cycles: int = option(
        1,
        "how often the rate falls: begun anew for cosine_with_restarts, as waves for cosine_with_min_lr and "
        "warmup_stable_decay",
        metavar="N",
        minimum=0,
    )
    lr_scheduler_power: float = option(1, "the exponent of polynomial; 1 is a straight line", metavar="X", minimum=0)
    lr_scheduler_timescale: int | None = option(
        None,
        "steps after the warm-up in which inverse_sqrt falls to 0.7 times the height; as many as the warm-up has when "
        "left out, or 10000 without one",
        metavar="N",
        minimum=1,
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "the lowest rate as a part of the highest; cosine_with_min_lr needs it, warmup_stable_decay has 0 without",
        metavar="X",
        minimum=0,
    )

    def __post_init__(self) -> None:
        keywords = self.keywords
        if self.lr_scheduler_type:
            if not all(map(str.isidentifier, self.lr_scheduler_type.split("."))):
                raise UserError(
                    f"--lr_scheduler_type: {self.lr_scheduler_type} is written neither as a class of "
                    "torch.optim.lr_scheduler nor as module.Class"
                )
            return
        if self.lr_scheduler not in LR_SCHEDULERS:
            *names, last = LR_SCHEDULERS
            raise UserError(
                f"--lr_scheduler: {self.lr_scheduler} is not available, choose {', '.join(names)} or {last}"
                f"{suggest(self.lr_scheduler, LR_SCHEDULERS)}"
            )
        if _LOWEST in LR_SCHEDULERS[self.lr_scheduler].flags and (self.lr_scheduler_min_lr_ratio or 0) > 1:
            raise UserError(
                f"--lr_scheduler_min_lr_ratio: {self.lr_scheduler_min_lr_ratio:g} is more than 1, and the lowest rate "
                "cannot be above the highest"
            )
        known = LR_SCHEDULERS[self.lr_scheduler].arguments
        for name in keywords if known else ():
            if name not in known:
                raise UserError(
                    f"--lr_scheduler_args: {self.lr_scheduler} takes no {name}{suggest(name, known)} (it takes "
                    f"{', '.join(known)})"
                )
        if self.lr_scheduler == "piecewise_constant" and not _RULES.fullmatch(self.step_rules):
            raise UserError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:100,0.1:200,0.01, which is 1 "
                "times the learning rate up to step 100, 0.1 times up to step 200 and 0.01 times from there on"
            )
        if self.lr_scheduler == "cosine_with_min_lr":
            self._check_lowest("min_lr" in keywords)

    def _check_lowest(self, has_min_lr: bool) -> None:
        if (self.lr_scheduler_min_lr_ratio is None) != has_min_lr:
            what = "only one of them" if has_min_lr else "one of them"
            raise UserError(
                "--lr_scheduler cosine_with_min_lr: the lowest rate is --lr_scheduler_min_lr_ratio, such as 0.1, or "
                f"--lr_scheduler_args min_lr=1e-6, give {what}"
            )

    @property
    def name(self) -> str:
        """What the rate follows."""
        return self.lr_scheduler_type or self.lr_scheduler

    @property
    def spelling(self) -> str:
        """The same as in a sentence."""
        return f"--lr_scheduler_type {self.name}" if self.lr_scheduler_type else f"--lr_scheduler {self.name}"

    @property
    def keywords(self) -> Mapping[str, str]:
        """`lr_scheduler_args` as name -> value, both as written."""
        return parse_key_values(self.lr_scheduler_args or (), "--lr_scheduler_args")

    @property
    def step_rules(self) -> str:
        """Of piecewise_constant: `factor:step` up to which it counts, with commas between them, and the last factor."""
        return self.keywords.get("step_rules", "").strip("'\"")

    @property
    def without_effect(self) -> list[str]:
        """The flags that are set and that the chosen course does not listen to."""
        heard = {"lr_scheduler_type", "lr_scheduler_args"}
        if not self.lr_scheduler_type:
            course = LR_SCHEDULERS[self.lr_scheduler]
            heard = {"lr_scheduler", *course.flags, *(["lr_scheduler_args"] if course.arguments else [])}
        set_ones = [field.name for field in fields(self) if getattr(self, field.name) not in (field.default, ())]
        return [f"--{name}" for name in set_ones if name not in heard]

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up in a run of `total_steps`; a fraction is rounded down."""
        return _steps(self.lr_warmup_steps, total_steps)

    def decay_steps(self, total_steps: int) -> int:
        """The same of the decay."""
        return _steps(self.lr_decay_steps, total_steps)

    @property
    def warmup_heard(self) -> int | float:
        """--lr_warmup_steps as far as it has an effect."""
        return 0 if f"--{_WARMUP}" in self.without_effect else self.lr_warmup_steps


def _steps(value: int | float, total_steps: int) -> int:
    return int(value * total_steps) if isinstance(value, float) else value
