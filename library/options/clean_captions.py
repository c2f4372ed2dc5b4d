"""Cleaning the captions and tags of metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class CleanCaptionsOptions:
    """Which metadata is cleaned, and by which rules."""

    title: ClassVar[str] = "cleaning captions and tags"
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"--in_json": "the file to read is named without a flag, before the one to write"}
    )

    in_json: Path | None = option(None, "metadata file to read", positional=True)  # noqa: RUF009 - makes a field
    out_json: Path | None = option(None, "metadata file to write; may be in_json", positional=True)  # noqa: RUF009
    rules: Path | None = option(  # noqa: RUF009
        None, "file of rules; finetune/cleaning_rules.toml when left out", metavar="FILE"
    )
    force: bool = option(False, "has no effect: everything is made anew each time")
    debug: bool = option(False, "show each caption and list of tags that changes, before and after")
