"""Whether a run still learns: what its losses and gradients must not do."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from library.errors import UserError

_FIRST = 100  # losses whose median is the run's measure
_EXPLODED = 100.0  # so many times that measure
_STEPS_ABOVE = 10  # so many steps in a row: one batch may well be that much harder than another
_STEPS_SKIPPED = 50  # in a row; a scale of gradients that starts at 65536 finds its value in 16

_SMALLER_STEPS = "lower the learning rate"
_OTHER_NUMBERS = "use --no_half_vae, another --mixed_precision, or another model file"

Names = Callable[[bool], str]  # the images of the step as in a sentence: those whose loss is not finite, or all


class NotFinite(UserError):
    """The run has gone wrong: nothing of it may be saved."""


class Health:
    """Judges every step by its loss and its gradient norm, which are the same in all processes.

    A run has exploded when ten steps in a row have a loss above 100 times the median of its first 100 losses.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.above = 0
        self.skipped = 0
        self.problem: str | None = None

    def judge(self, step: int, loss: float, norm: float, skipped: bool, images: Names) -> str | None:
        """The sentence about what is wrong, from the step on in which it is, or None."""
        if self.problem is None:
            self.problem = self._of_skipped(step) if skipped else self._of_taken(step, loss, norm, images)
        return self.problem

    def _of_skipped(self, step: int) -> str | None:
        self.skipped += 1
        if self.skipped < _STEPS_SKIPPED:
            return None
        return (
            f"the gradients of {self.skipped} steps in a row have overflowed, the last in step {step}, so nothing is "
            "learned: use --mixed_precision bf16, or --no_half_vae if the model's autoencoder overflows in half "
            "precision"
        )

    def _of_taken(self, step: int, loss: float, norm: float, images: Names) -> str | None:
        self.skipped = 0
        if not math.isfinite(loss):
            return (
                f"the loss is not finite since step {step} ({images(True)}), so the run ends and nothing more is "
                f"saved: {_SMALLER_STEPS}, or, if it was so from the start, {_OTHER_NUMBERS}"
            )
        if not math.isfinite(norm):
            return (
                f"the gradients are not finite since step {step} ({images(False)}) although the loss is, so the run "
                f"ends and nothing more is saved: {_SMALLER_STEPS}, or, if it was so from the start, {_OTHER_NUMBERS}"
            )
        if len(self.first) < _FIRST:
            self.first.append(loss)
            return None
        usual = statistics.median(self.first)
        self.above = self.above + 1 if 0 < usual * _EXPLODED < loss else 0
        if self.above < _STEPS_ABOVE:
            return None
        return (
            f"the loss has exploded: in the {self.above} steps up to step {step} ({images(False)}) it was above "
            f"{usual * _EXPLODED:.3g}, {_EXPLODED:.0f} times what it was at first, so the run ends and nothing more is "
            f"saved: {_SMALLER_STEPS}, and go on from what was saved before"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self.first), "above": self.above, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = list(state["first"])
        self.above = state["above"]
        self.skipped = state["skipped"]
