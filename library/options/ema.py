"""The moving average of the trained weights."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class EmaOptions:
    """Whether one is kept, and how slowly it moves."""

    title: ClassVar[str] = "moving average of the weights"

    ema: bool = option(False, "keep a moving average of the trained weights, too, and save it beside them")
    # 0.9999 is what Stable Diffusion itself was trained with; the warm-up makes it fit for short runs, too.
    ema_decay: float = option(
        0.9999,
        "weight of the past in the moving average, which spans about 1 / (1 - X) steps, but never more than a ninth of "
        "those done",
        metavar="X",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.ema_decay >= 1:
            raise UserError(
                f"--ema_decay: at {self.ema_decay} the average would never move, use a number below 1, such as 0.9999"
            )
