"""Making smaller versions of pictures."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class ResizeImagesOptions:
    """Which pictures get smaller versions, of which sizes, and where all of it goes."""

    title: ClassVar[str] = "resizing pictures"

    src_img_folder: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "folder of pictures", positional=True
    )
    dst_img_folder: Path | None = option(  # noqa: RUF009
        None, "folder for their copies and smaller versions", positional=True
    )
    max_resolution: str = option(
        "512x512,384x384,256x256,128x128",
        "sizes whose areas larger pictures are shrunk to, separated by commas",
        metavar="SIZES",
    )
    divisible_by: int = option(
        1, "cut smaller versions around their middle so that both sides are multiples of this", metavar="N", minimum=1
    )
    interpolation: str | None = option(
        None,
        "how pixels are made smaller ones of; area when left out",
        metavar="METHOD",
        choices=("area", "cubic", "lanczos4", "nearest", "linear", "box"),
    )
    save_as_png: bool = option(False, "write smaller versions as .png, with their transparency, instead of .jpg")
    copy_associated_files: bool = option(
        False, "copy captions and other files of a picture's name for its smaller versions, too"
    )
    recursive: bool = option(False, "also the folders below, which are kept as they are")

    def __post_init__(self) -> None:
        _ = self.resolutions

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each size, in order, none twice. UserError for what is no size."""
        found = {}
        for word in filter(None, map(str.strip, self.max_resolution.split(","))):
            sides = re.fullmatch(r"0*([1-9][0-9]*)\s*[xX]\s*0*([1-9][0-9]*)", word)
            if sides is None:
                raise UserError(
                    f"--max_resolution: {word!r} is not a width and a height in pixels, write them as in 512x512"
                )
            found[int(sides[1]), int(sides[2])] = True
        if not found:
            raise UserError("--max_resolution: no size is given, write one or several as in 512x512,384x384")
        return tuple(found)
