"""Merging captions or tags into metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class MergeCaptionsOptions:
    """Which pictures' captions go into which metadata file."""

    title: ClassVar[str] = "merging captions"

    train_data_dir: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "folder of the pictures and their captions", positional=True
    )
    out_json: Path | None = option(  # noqa: RUF009
        None, "metadata file to write; what an existing one holds is kept, unless --in_json is given", positional=True
    )
    in_json: Path | None = option(  # noqa: RUF009
        None, "metadata file whose entries are kept and added to; may be out_json", metavar="FILE"
    )
    caption_extension: str = option(
        ".caption", "ending of the caption files", metavar="EXT", aliases=("caption_extention",)
    )
    full_path: bool = option(
        False, "name pictures by their absolute paths, as several folders in one metadata file need it"
    )
    recursive: bool = option(False, "also take the pictures in all folders below; needs --full_path")
    force: bool = option(False, "has no effect: everything is made anew each time")
    debug: bool = option(False, "show each picture's text, and what it takes the place of")

    def __post_init__(self) -> None:
        if self.recursive and not self.full_path:
            raise UserError(
                "--recursive: pictures in several folders may have the same name, add --full_path to name them by paths"
            )


@dataclass(frozen=True)
class MergeTagsOptions(MergeCaptionsOptions):
    """Which pictures' tags go into which metadata file."""

    title: ClassVar[str] = "merging tags"

    train_data_dir: Path | None = option(None, "folder of the pictures and their tags", positional=True)  # noqa: RUF009
    caption_extension: str = option(".txt", "ending of the files that hold the tags", metavar="EXT")
