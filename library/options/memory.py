"""What is kept in memory, and where."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class MemoryOptions:
    """What saves memory at the cost of time, or the other way round."""

    title: ClassVar[str] = "memory"

    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them: slower, much less memory"
    )
