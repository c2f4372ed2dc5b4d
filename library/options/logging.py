"""Where the course of a run is logged."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LogOptions:
    """Trackers of loss, learning rate and previews."""

    title: ClassVar[str] = "logging"

    logging_dir: str | None = option(
        None, "folder for logs; without it only Weights & Biases can be logged to", metavar="FOLDER"
    )
    log_with: str | None = option(
        None,
        "what to log with; tensorboard when only --logging_dir is given",
        metavar="NAME",
        choices=(*TRACKERS, "all"),
    )
    log_prefix: str | None = option(None, "put in front of the time that names the run's log folder", metavar="TEXT")
    log_tracker_name: str | None = option(
        None,
        "name of the tracker's folder, and of the project at Weights & Biases; that of the training method when left "
        "out",
        metavar="NAME",
    )
    log_tracker_config: str | None = option(
        None,
        "TOML file with the tables [tensorboard] and [wandb]: what torch's SummaryWriter and wandb.init are to be "
        "started with",
        metavar="FILE",
    )
    log_config: bool = option(False, "log the settings, too, without secrets and with the names of files only")
    wandb_run_name: str | None = option(
        None, "name of the run at Weights & Biases, which thinks of one when left out", metavar="NAME"
    )
    wandb_api_key: str | None = option(
        None,
        "key for Weights & Biases; others on this machine can read it while the program runs, which they cannot if it "
        "is the environment variable WANDB_API_KEY, or kept by `wandb login`",
        metavar="KEY",
        secret=True,
    )

    def __post_init__(self) -> None:
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            raise UserError(f"--log_with: {self.log_with} needs --logging_dir, which names the folder for logs")

    @property
    def trackers(self) -> tuple[str, ...]:
        """What is logged with, by accelerate's names."""
        if self.log_with == "all":
            return TRACKERS
        if self.log_with:
            return (self.log_with,)
        return ("tensorboard",) if self.logging_dir else ()
