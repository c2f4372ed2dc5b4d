"""When a run's losses forbid saving it."""

import pytest
import torch
from accelerate import Accelerator

from library.data.plan import BatchPlan
from library.errors import UserError
from library.training.state import Progress
from library.training.stepper import StepInfo
from library.training.tracking import Tracker

PLAN = BatchPlan(
    epoch=1,
    step=0,
    micro=0,
    last_micro=True,
    items=(),
    bucket=(32, 32),
    dataset=0,
    images_in_step=2,
    filler=False,
    last_of_epoch=False,
)


def tracker_after(*steps: tuple[float, bool]) -> Tracker:
    """A tracker that has seen these (loss, skipped)."""
    progress = Progress(total_steps=len(steps), total_epochs=1)
    tracker = Tracker(Accelerator(cpu=True), progress)
    for loss, skipped in steps:
        tracker.add(torch.tensor([loss, loss]), PLAN)
        progress.advance(PLAN)
        tracker.step(StepInfo(torch.tensor(1.0), skipped, {"unet": 1e-4}), progress)
    return tracker


def test_sound_losses_may_be_saved():
    tracker_after((0.5, False), (0.4, False)).require_finite_losses()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_forbids_saving_even_in_the_last_step(loss):
    with pytest.raises(UserError, match="the loss is not finite since step 1"):
        tracker_after((0.5, False), (loss, False)).require_finite_losses()


def test_a_skipped_step_moved_nothing_and_forbids_nothing():
    tracker_after((float("inf"), True), (0.4, False)).require_finite_losses()
