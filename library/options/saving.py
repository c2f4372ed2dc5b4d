"""Where the result goes, and what is kept on the way."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class SaveOptions:
    """Output files. An interval of 0 is the same as none, and both intervals act together."""

    title: ClassVar[str] = "saving"

    output_dir: str | None = option(None, "folder the trained files are written to; made if missing", metavar="FOLDER")
    output_name: str | None = option(
        None, "file name without extension; `last` for the final file when left out", metavar="NAME"
    )
    save_precision: str | None = option(
        None,
        "number format of saved weights; that of training when left out",
        metavar="FORMAT",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = option(None, "also save after every N epochs", metavar="N", minimum=0)
    save_every_n_steps: int | None = option(None, "also save after every N optimizer steps", metavar="N", minimum=0)
    save_n_epoch_ratio: int | None = option(
        None,
        "also save after epochs, so often that there are N files in all, the last included",
        metavar="N",
        minimum=0,
    )
    save_last_n_epochs: int | None = option(
        None, "of the files saved after epochs keep the last N", metavar="N", minimum=0
    )
    save_last_n_steps: int | None = option(
        None, "of the files saved after steps keep those of the last N steps", metavar="N", minimum=0
    )
    save_state: bool = option(
        False, "beside every saved file write a state to resume from; runs that are interrupted write one anyway"
    )
    save_state_on_train_end: bool = option(False, "write a state at the end, to train on from there some day")
    save_last_n_epochs_state: int | None = option(
        None, "--save_last_n_epochs for states; that one's value when left out", metavar="N", minimum=0
    )
    save_last_n_steps_state: int | None = option(
        None, "--save_last_n_steps for states; that one's value when left out", metavar="N", minimum=0
    )

    def __post_init__(self) -> None:
        if self.output_name and any(separator in self.output_name for separator in "/\\"):
            raise UserError(f"--output_name: {self.output_name} is a path, give the folder as --output_dir")

    def epoch_interval(self, total_epochs: int) -> int | None:
        """Epochs from one numbered file to the next in a run of `total_epochs`; None for no such files."""
        if self.save_n_epoch_ratio:
            return max(total_epochs // self.save_n_epoch_ratio, 1)
        return self.save_every_n_epochs or None

    def step_stem(self, step: int) -> str:
        """Name, without extension, of what is saved after a step."""
        return f"{self.output_name or 'at'}-step{step:08d}"

    def epoch_stem(self, epoch: int) -> str:
        """The same after an epoch."""
        return f"{self.output_name or 'epoch'}-{epoch:06d}"

    @property
    def best_stem(self) -> str:
        """The same of --save_best."""
        return f"{self.output_name}-best" if self.output_name else "best"

    @property
    def name(self) -> str:
        """The final file's name without extension."""
        return self.output_name or "last"
