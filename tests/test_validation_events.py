"""What a run makes of its validation losses, told beforehand here."""

import pytest

from library.options.saving import SaveOptions
from library.options.validation import ValidationOptions
from library.training.requests import RunEnded
from library.training.resuming.state import Progress
from library.training.validation import SaveBest, StopEarly, Validate, ValidationLoss


class Scripted:
    """A validator whose losses are told beforehand, and a log."""

    images = 1
    fingerprint = 1

    def __init__(self, *losses: float):
        self.losses = iter(losses)
        self.logged: dict[int, dict[str, float]] = {}
        self.log = self

    def measure(self) -> ValidationLoss:
        return ValidationLoss(next(self.losses), {})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values


def validate(options: ValidationOptions, *losses: float) -> Validate:
    script = Scripted(*losses)
    return Validate(options, script, script)


def after(step: int, total: int = 100) -> Progress:
    return Progress(total, 1, step=step)


def play(events, steps, total=100):
    for step in steps:
        for event in [event for event in events if event.due(after(step, total))]:
            event(after(step, total))


def test_the_best_is_saved_each_time_it_gets_better_and_the_untrained_model_does_not_compete():
    options, saved = ValidationOptions(save_best=True, validate_every_n_steps=1), []
    measured = validate(options, 0.1, 0.5, 0.6, 0.4, 0.4)
    best = SaveBest(
        options, SaveOptions(output_name="run"), measured, lambda stem, at: not saved.append((stem, at.step))
    )
    measured.at_first(after(0))
    play([measured, best], [1, 2, 3, 4])
    assert saved == [("run-best", 1), ("run-best", 3)]
    assert SaveBest(options, SaveOptions(), measured, saved.append).stem == "best"
    assert not SaveBest(ValidationOptions(), SaveOptions(), measured, saved.append).due(after(1))


def test_a_best_file_that_could_not_be_written_does_not_keep_a_later_one_from_it():
    options, saved = ValidationOptions(save_best=True, validate_every_n_steps=1), []

    def save_as(stem: str, at: Progress) -> bool:
        saved.append(at.step)
        return at.step != 2

    measured = validate(options, 0.5, 0.3, 0.6)
    play([measured, SaveBest(options, SaveOptions(), measured, save_as)], [1, 2, 3])
    resumed = validate(options, 0.4, 0.35, 0.4)
    resumed.load_state_dict(measured.state_dict())
    play([resumed, SaveBest(options, SaveOptions(), resumed, save_as)], [4, 5, 6])
    assert saved == [1, 2, 4, 5]
    assert resumed.history.best_step == 2


def test_it_ends_after_so_many_without_improvement_and_never_in_the_last_step():
    options = ValidationOptions(stop_after_no_improvement=2, validate_every_n_steps=10)
    measured = validate(options, 0.5, 0.6, 0.4, 0.4, 0.45)
    stop = StopEarly(options, measured)
    play([measured, stop], [10, 15, 20, 30, 40])
    assert measured.history.since_best == 1
    with pytest.raises(RunEnded, match=r"2 validations .*0\.4000 after step 30, the best, 0\.4500 after step 50"):
        play([measured, stop], [50])
    play([StopEarly(options, measured)], [60], total=60)


def test_what_was_measured_survives_and_other_images_start_anew(fresh_console, capsys):
    options = ValidationOptions(stop_after_no_improvement=2, validate_every_n_steps=1)
    measured = validate(options, 0.4, 0.5)
    play([measured], [1, 2])
    resumed = validate(options, 0.45)
    resumed.load_state_dict(measured.state_dict())
    with pytest.raises(RunEnded):
        play([resumed, StopEarly(options, resumed)], [3])
    other = validate(options, 0.45)
    other.validator.fingerprint = 2
    other.load_state_dict(measured.state_dict())
    play([other, StopEarly(options, other)], [3])
    assert other.history.best_step == 3
    assert "starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ({}, {3, 6, 7}),
        ({"validate_every_n_epochs": 2}, {6, 7}),
        ({"validate_every_n_steps": 2}, {2, 4, 6, 7}),
        ({"validate_every_n_steps": 0, "validate_every_n_epochs": 0}, {3, 6, 7}),
        ({"validate_every_n_steps": 5, "validate_every_n_epochs": 1}, {3, 5, 6, 7}),
    ],
)
def test_intervals(given, due):
    """Epochs of three steps, and an eighth and last step that was never reached."""
    event = validate(ValidationOptions(**given))

    def progress(step: int) -> Progress:
        return Progress(7, 3, step=step, epoch=-(-step // 3), epoch_ended=step % 3 == 0)

    assert {step for step in range(1, 8) if event.due(progress(step))} == due
    event.validator.images = 0
    assert not event.due(progress(6))


def test_a_resumed_run_has_no_new_beginning():
    event = validate(ValidationOptions(), 0.5)
    event.at_first(after(5))
    assert not event.history.losses
