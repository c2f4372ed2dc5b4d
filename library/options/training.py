"""How long is trained, and on how many images at a time."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class TrainingOptions:
    """The length of the run and what makes it repeatable."""

    title: ClassVar[str] = "training"

    max_train_steps: int = option(1600, "optimizer steps to train for", metavar="N", minimum=1)
    max_train_epochs: int | None = option(
        None, "epochs to train for; overrules --max_train_steps", metavar="N", minimum=1
    )
    seed: int | None = option(
        None, "makes the run repeatable; without it a seed is drawn, shown and recorded", metavar="N"
    )
    deterministic: bool = option(
        False,
        "use only operations that give the same result every time, so that a GPU, too, repeats a run of the same seed "
        "bit for bit; slower",
    )
    gradient_accumulation_steps: int = option(
        1,
        "micro-batches per optimizer step; their images weigh the same however they are divided",
        metavar="N",
        minimum=1,
    )
    prior_loss_weight: float = option(1.0, "weight of regularisation images in the loss", metavar="X", minimum=0)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run: epochs overrule steps."""
        if self.max_train_epochs is not None:
            return self.max_train_epochs * steps_per_epoch
        return self.max_train_steps
