"""Which of the numbered files stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from library.options.saving import SaveOptions

Outdated = Callable[[Sequence[int], int], list[int]]


def last_saved(count: int | None) -> Outdated:
    """Of the numbers in order: all but the last `count`. None or 0 keeps all."""
    return lambda numbers, now: list(numbers[: -count or None]) if count else []


def last_steps(count: int | None) -> Outdated:
    """Those more than `count` before now. None or 0 keeps all."""
    return lambda numbers, now: [number for number in numbers if number < now - count] if count else []


@dataclass
class Series:
    """Files that this run has saved under numbers, and that make room for new ones."""

    outdated: Outdated
    written: dict[int, list[str]] = field(default_factory=dict)
    """Names of files and folders by number, in the order in which they were written."""

    def add(self, number: int, names: list[str]) -> None:
        self.written.pop(number, None)
        self.written[number] = names


def all_series(options: SaveOptions) -> dict[str, Series]:
    """What a run numbers: files and states, after epochs and steps."""
    epochs, steps = options.save_last_n_epochs, options.save_last_n_steps
    of_epochs, of_steps = options.save_last_n_epochs_state, options.save_last_n_steps_state
    return {
        "epochs": Series(last_saved(epochs)),
        "steps": Series(last_steps(steps)),
        "states of epochs": Series(last_saved(epochs if of_epochs is None else of_epochs)),
        "states of steps": Series(last_steps(steps if of_steps is None else of_steps)),
    }
