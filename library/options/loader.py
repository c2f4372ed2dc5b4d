"""How batches are read while training."""

import os
from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class LoaderOptions:
    """Data-loader processes. They change the speed of a run, never its result."""

    title: ClassVar[str] = "data loading"

    max_data_loader_n_workers: int = option(
        8,
        "most processes that read images beside the training, at most one less than there are CPUs; 0 for none",
        metavar="N",
        minimum=0,
    )
    persistent_data_loader_workers: bool = option(False, "has no effect: these processes always last the whole run")

    @property
    def workers(self) -> int:
        """Processes to start: what was asked for, but one CPU is left to the training."""
        return min(self.max_data_loader_n_workers, max((os.cpu_count() or 1) - 1, 0))
