"""Reading the other options from a file, and writing them to one."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class ConfigOptions:
    """The config file."""

    title: ClassVar[str] = "config file"

    config_file: str | None = option(
        None, "TOML file of options by name, sections are ignored; the command line wins over it", metavar="FILE"
    )
    output_config: bool = option(False, "write all settings to --config_file, which must not exist yet, and exit")
