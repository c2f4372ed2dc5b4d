"""How a tool works through a folder of pictures."""

import os
from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class WorkOptions:
    """What has to be done again, and with how many threads."""

    title: ClassVar[str] = "working through pictures"

    force: bool = option(False, "do again what is done already, in place of what is there")
    max_data_loader_n_workers: int | None = option(
        None,
        "threads that read pictures; one less than CPUs, at most 8, when left out",
        metavar="N",
        minimum=0,
    )

    @property
    def threads(self) -> int:
        """How many pictures are read at once."""
        wanted = self.max_data_loader_n_workers
        return max(1, min(8, (os.cpu_count() or 1) - 1) if wanted is None else wanted)
