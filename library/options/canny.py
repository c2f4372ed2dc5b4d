"""Finding the edges in pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class CannyOptions:
    """Which pictures are looked at, what counts as an edge in them, and where the edges go."""

    title: ClassVar[str] = "finding edges"

    input: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "a picture, or a folder of pictures", metavar="PATH"
    )
    output: Path | None = option(  # noqa: RUF009
        None, "the picture to write; of a folder, the folder for a .png of each picture's name", metavar="PATH"
    )
    thres1: int = option(32, "how steep what continues an edge has to be", metavar="N", minimum=0)
    thres2: int = option(224, "how steep an edge has to be somewhere", metavar="N", minimum=0)
    recursive: bool = option(False, "also the pictures in the folders below, which are kept as they are")

    def __post_init__(self) -> None:
        if self.input is None:
            raise UserError("--input: no picture is given, name a picture or a folder of them")
        if self.output is None:
            raise UserError("--output: what to write is not named, name a picture, or a folder for those of a folder")
