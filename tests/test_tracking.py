"""What is measured of a run's steps, and which losses end it."""

import io
from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator

from library.data.batch import Batch
from library.data.plan import BatchPlan
from library.errors import UserError
from library.training.optimization.stepper import StepInfo
from library.training.resuming.state import Progress
from library.training.tracking import Tracker

NAN, INF = float("nan"), float("inf")


def batch_of(timesteps: Sequence[int], step: int = 0, weights: Sequence[float] | None = None) -> Batch:
    """A whole step's batch; its seeds are its timesteps, and its records are numbered from 0."""
    size = len(timesteps)
    plan = BatchPlan(
        epoch=1,
        step=step,
        micro=0,
        last_micro=True,
        items=(),
        bucket=(32, 32),
        dataset=0,
        images_in_step=size,
        filler=False,
        last_of_epoch=False,
    )
    return Batch(
        plan=plan,
        seeds=list(timesteps),
        records=list(range(size)),
        captions=[""] * size,
        images=None,
        latents=None,
        text=None,
        sizes=torch.zeros(size, 6),
        loss_mask=None,
        weights=torch.ones(size) if weights is None else torch.tensor(weights),
    )


class Run:
    """A tracker, and what it logged by step. Losses are given per image."""

    def __init__(self) -> None:
        self.progress = Progress(total_steps=1000, total_epochs=1)
        self.logged: dict[int, dict[str, float]] = {}
        self.tracker = Tracker(
            Accelerator(cpu=True),
            timesteps_of=lambda batch: torch.tensor(batch.seeds),
            name_of=lambda record: f"{record}.png",
        )
        self.tracker.log.scalars = lambda values, step: self.logged.update({step: values})

    def step(
        self,
        *losses: float,
        timesteps: Sequence[int] = (),
        weights: Sequence[float] | None = None,
        norm: float = 1.0,
        skipped: bool = False,
    ) -> None:
        batch = batch_of(timesteps or [500] * len(losses), self.progress.step, weights)
        self.tracker.add(torch.tensor(losses), batch)
        self.progress.advance(batch.plan)
        self.tracker.step(StepInfo(torch.tensor(norm), skipped, {"unet": 1e-4}), self.progress)


def test_sound_losses_may_be_saved():
    run = Run()
    run.step(0.5)
    run.step(0.4)
    run.tracker.require_finite_losses()


@pytest.mark.parametrize("loss", [NAN, INF])
def test_a_loss_that_is_not_finite_ends_the_run_a_step_later_and_names_the_image(loss):
    run = Run()
    run.step(0.5, 0.5, 0.5)
    run.step(0.5, loss, 0.5)
    with pytest.raises(UserError, match=r"the loss is not finite since step 2 \(images: 1\.png\).* learning rate"):
        run.step(0.5, 0.5, 0.5)
    assert not run.logged[2]["loss/current"] < INF  # the curve shows it
    with pytest.raises(UserError, match="since step 2"):
        run.tracker.require_finite_losses()


def test_the_last_step_forbids_saving_and_storing_too():
    run = Run()
    run.step(NAN)
    with pytest.raises(UserError, match="since step 1"):
        run.tracker.require_finite_losses()
    run = Run()
    run.step(NAN)
    with pytest.raises(UserError, match="since step 1"):
        run.tracker.flush()


def test_gradients_that_are_not_finite_end_the_run():
    run = Run()
    run.step(0.5, 0.5, norm=NAN)
    with pytest.raises(UserError, match=r"gradients are not finite since step 1 \(images: 0\.png, 1\.png\)"):
        run.tracker.flush()


def test_skipped_steps_moved_nothing_and_spoil_no_average():
    run = Run()
    run.step(0.5)
    run.step(INF, norm=INF, skipped=True)
    run.step(0.7)
    run.tracker.flush()
    assert run.logged[3]["loss/average"] == pytest.approx(0.6)
    assert run.logged[3]["loss/average/500-749"] == pytest.approx(0.6)


def test_fifty_skipped_steps_in_a_row_end_the_run():
    run = Run()
    for _ in range(2):
        for _ in range(49):
            run.step(0.5, norm=INF, skipped=True)
        run.step(0.5)
    for _ in range(50):
        run.step(0.5, norm=INF, skipped=True)
    with pytest.raises(UserError, match="50 steps in a row have overflowed, the last in step 150"):
        run.tracker.flush()


def test_ten_steps_far_above_the_first_hundred_end_the_run():
    run = Run()
    for number in range(100):
        run.step(0.1 if number < 60 else 30.0)  # the median counts, so that a bad start is no measure
    for _ in range(9):
        run.step(11.0)
    run.step(9.0)
    for _ in range(10):
        run.step(11.0)
    with pytest.raises(UserError, match=r"has exploded: in the 10 steps up to step 120 \(images: 0\.png\)"):
        run.tracker.flush()


def test_losses_are_averaged_per_range_of_timesteps():
    run = Run()
    run.step(1.0, 2.0, 4.0, timesteps=[0, 249, 999])
    run.step(6.0, 3.0, 0.0, timesteps=[100, 750, 300], weights=[1, 1, 0])  # the last one is not trained on
    run.tracker.flush()
    first, second = (
        {tag: value for tag, value in run.logged[step].items() if tag.startswith("loss/average/")} for step in (1, 2)
    )
    assert first == pytest.approx({"loss/average/000-249": 1.5, "loss/average/750-999": 4.0})
    assert second == pytest.approx({"loss/average/000-249": 3.0, "loss/average/750-999": 3.5})


def test_everything_measured_is_logged():
    run = Run()
    run.step(0.5, 1.5)
    run.tracker.flush()
    values = run.logged[1]
    assert (values["loss/current"], values["gradient_norm"], values["lr/unet"]) == (1.0, 1.0, 1e-4)
    assert values["images_per_second"] > 0
    assert 0 <= values["waiting_for_data"] <= 1
    assert 0.01 < values["memory"] < 1000


def test_curves_and_judgement_go_on_after_a_resume():
    """As if there had been no interruption: averages, and how many steps were skipped, or too high, in a row."""
    whole, resumed = Run(), Run()

    def interrupt() -> None:
        nonlocal resumed
        resumed.tracker.flush()
        file = io.BytesIO()
        torch.save(resumed.tracker.state_dict(), file)
        file.seek(0)
        fresh = Run()
        fresh.progress.step = resumed.progress.step
        fresh.tracker.load_state_dict(torch.load(file, weights_only=True))
        fresh.logged = resumed.logged
        resumed = fresh
        resumed.tracker.log.scalars = lambda values, step: resumed.logged.update({step: values})

    def both(loss: float, timestep: int = 0, skipped: bool = False) -> None:
        for run in (whole, resumed):
            run.step(loss, timesteps=[timestep], skipped=skipped)

    for number in range(110):
        both(0.1 + number, timestep=number * 9)
        if number == 70:
            interrupt()
    whole.tracker.flush()
    resumed.tracker.flush()
    for step, values in whole.logged.items():
        losses = {tag: value for tag, value in values.items() if tag.startswith("loss/")}
        assert losses == {tag: value for tag, value in resumed.logged[step].items() if tag.startswith("loss/")}
    for _ in range(30):
        both(0.1, skipped=True)
    interrupt()
    for _ in range(20):
        both(0.1, skipped=True)
    with pytest.raises(UserError, match="50 steps in a row"):
        resumed.tracker.flush()
