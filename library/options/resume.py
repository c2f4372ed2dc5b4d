"""Going on with a run that ended before its time."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class ResumeOptions:
    """Where a run starts."""

    title: ClassVar[str] = "resuming"

    resume: str | None = option(
        None,
        "go on from this state: its folder, an output folder (its newest state), or `latest` (the newest state in "
        "--output_dir; a new run if there is none, and nothing to do if it is of the end)",
        metavar="FOLDER",
    )
    resume_new_learning_rate: bool = option(
        False, "let the learning rates of this command line overrule those of the state"
    )
    initial_epoch: int | None = option(
        None,
        "start at this epoch, counted from 1, with images and names of files as if those before were done; the "
        "learning rate's curve starts at its beginning, or goes on where the state of --resume is",
        metavar="N",
        minimum=1,
    )
    initial_step: int | None = option(
        None,
        "the same for optimizer steps: this many count as done; overrules --initial_epoch",
        metavar="N",
        minimum=0,
    )
    skip_until_initial_step: bool = option(
        False, "start exactly at --initial_step; without it, at the beginning of the epoch which that step is in"
    )

    def __post_init__(self) -> None:
        if self.resume_new_learning_rate and not self.resume:
            raise UserError("--resume_new_learning_rate: only a run that is resumed has an old rate, add --resume")

    def first_step(self, steps_per_epoch: int) -> int | None:
        """The steps that count as done because a flag says so; None where none does."""
        if self.initial_step is None:
            return None if self.initial_epoch is None else (self.initial_epoch - 1) * steps_per_epoch
        skipped = 0 if self.skip_until_initial_step else self.initial_step % steps_per_epoch
        return self.initial_step - skipped
