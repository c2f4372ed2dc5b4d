"""The learning rate over time."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError, suggest
from library.options.base import option

LR_SCHEDULERS = ("constant", "constant_with_warmup")


@dataclass(frozen=True)
class SchedulerOptions:
    """The course of the learning rate over a run."""

    title: ClassVar[str] = "learning rate over time"

    lr_scheduler: str = option(
        "constant", f"course of the learning rate, one of: {', '.join(LR_SCHEDULERS)}", metavar="NAME"
    )
    lr_warmup_steps: int | float = option(
        0,
        "steps in which the rate rises from 0, as a number or as a part of all steps (0.1 or 10%); for "
        "constant_with_warmup",
        metavar="N",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.lr_scheduler not in LR_SCHEDULERS:
            names = " or ".join(LR_SCHEDULERS)
            raise UserError(
                f"--lr_scheduler: {self.lr_scheduler} is not available, choose {names}"
                f"{suggest(self.lr_scheduler, LR_SCHEDULERS)}"
            )

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of the warm-up in a run of `total_steps`; a fraction is rounded down."""
        if isinstance(self.lr_warmup_steps, float):
            return int(self.lr_warmup_steps * total_steps)
        return self.lr_warmup_steps
