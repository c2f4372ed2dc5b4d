"""What is tried and told before the first step."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class RehearsalOptions:
    """Nothing here changes what is learned."""

    title: ClassVar[str] = "before training"

    no_rehearsal: bool = option(
        False,
        "begin with the first step; without it the largest step, a preview and a save are tried before, to see whether "
        "memory and disk suffice",
    )
    dry_run: bool = option(
        False,
        "check everything, show what would be trained, how long, what would be written when and how much memory that "
        "takes, and end without loading weights or writing anything",
    )
