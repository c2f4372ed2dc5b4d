"""Where the course of a run is logged."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class LogOptions:
    """Trackers of loss, learning rate and previews."""

    title: ClassVar[str] = "logging"

    logging_dir: str | None = option(None, "folder for logs; nothing is logged when left out", metavar="FOLDER")
    log_with: str | None = option(
        None,
        "what to log with; tensorboard when left out, and the only one available",
        metavar="NAME",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, "put in front of the time that names the run's log folder", metavar="TEXT")
    log_tracker_name: str | None = option(
        None, "name of the tracker's folder; that of the training method when left out", metavar="NAME"
    )

    def __post_init__(self) -> None:
        if self.log_with not in (None, "tensorboard"):
            raise UserError(f"--log_with: {self.log_with} is not available, choose tensorboard")
        if self.log_with and not self.logging_dir:
            raise UserError("--log_with: nothing can be logged without --logging_dir, which names the folder for logs")
