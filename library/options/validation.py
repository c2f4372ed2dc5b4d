"""When the loss on held-out images is measured, and what follows from it."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice
from library.errors import UserError
from library.options.base import option

_REMEDY = "hold some out with --validation_split"


@dataclass(frozen=True)
class ValidationOptions:
    """Validation. It never changes the run. An interval of 0 is the same as none, and both intervals act together."""

    title: ClassVar[str] = "validation"

    validate_every_n_steps: int | None = option(
        None,
        "measure the loss on held-out images after every N optimizer steps; without any interval after every epoch",
        metavar="N",
        minimum=0,
    )
    validate_every_n_epochs: int | None = option(None, "the same after every N epochs", metavar="N", minimum=0)
    max_validation_steps: int | None = option(
        None, "most batches of held-out images that are used, always the same ones; 0 for all", metavar="N", minimum=0
    )
    save_best: bool = option(
        False, "after each validation that is the best so far, write <output_name>-best over the one before"
    )
    stop_after_no_improvement: int | None = option(
        None, "end the run after N validations in a row that are no better than the best", metavar="N", minimum=1
    )

    @property
    def step_interval(self) -> int | None:
        """Optimizer steps between validations, None for none."""
        return self.validate_every_n_steps or None

    @property
    def epoch_interval(self) -> int | None:
        """Epochs between validations, None for none."""
        return self.validate_every_n_epochs or (None if self.step_interval else 1)

    def check(self, held_out: bool) -> None:
        """UserError for what cannot work unless images are `held_out`."""
        names = ("save_best", "stop_after_no_improvement")
        wrong = [f"--{name}" for name in names if getattr(self, name)]
        if wrong and not held_out:
            raise UserError(f"{wrong[0]}: there are no held-out images to judge the weights by, {_REMEDY}")

    def note_unused(self, held_out: bool) -> None:
        """One notice of what has no effect unless images are `held_out`, as command lines may carry it along."""
        names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
        unused = [f"--{name}" for name in names if getattr(self, name)]
        if unused and not held_out:
            verb = "has" if len(unused) == 1 else "have"
            notice(f"{' and '.join(unused)} {verb} no effect: there are no held-out images, {_REMEDY}")
