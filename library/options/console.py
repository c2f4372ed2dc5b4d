"""What is shown on the console."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class ConsoleOptions:
    """How much is shown, how, and where else it is kept."""

    title: ClassVar[str] = "console"

    console_log_level: str | None = option(
        None,
        "what is shown: INFO, which is the default, shows everything; WARNING leaves notices out, ERROR and CRITICAL "
        "leave only errors; DEBUG adds what packages warn of",
        metavar="LEVEL",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, "file to which everything said is added, what is not shown included", metavar="FILE"
    )
    console_log_simple: bool = option(
        False, "plain lines now and then instead of progress bars, for programs that capture what is shown"
    )
