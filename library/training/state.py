"""Where a run stands."""

from dataclasses import dataclass

from library.data.plan import BatchPlan


@dataclass
class Progress:
    """How far a run has come. Everything that names or numbers what a run writes reads it here."""

    total_steps: int
    total_epochs: int
    step: int = 0  # optimizer steps done
    epoch: int = 1  # the epoch of the last step, counted from 1
    epoch_ended: bool = False  # the last step was its epoch's last
    images: int = 0  # images trained on, over all processes

    def advance(self, plan: BatchPlan) -> None:
        """Count the optimizer step that ended with this micro-batch."""
        self.step = plan.step + 1
        self.epoch = plan.epoch
        self.epoch_ended = plan.last_of_epoch
        self.images += plan.images_in_step

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps
