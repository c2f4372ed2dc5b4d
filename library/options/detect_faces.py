"""Cutting out faces."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

DEFAULT_MODEL = "opencv/face_detection_yunet/face_detection_yunet_2023mar.onnx"


@dataclass(frozen=True)
class DetectFacesOptions:
    """Which pictures are searched for faces, by which detector, and what is written of them."""

    title: ClassVar[str] = "cutting out faces"

    src_dir: Path | None = option(None, "folder of pictures", metavar="FOLDER")  # noqa: RUF009 - makes a field
    dst_dir: Path | None = option(  # noqa: RUF009 - makes a field
        None, "folder for the results; made if it is not there", metavar="FOLDER"
    )
    recursive: bool = option(False, "also take the pictures in folders below; the results lie in the same folders")
    rotate: bool = option(False, "turn the picture so that the face is upright")
    resize_fit: bool = option(False, "scale the picture so that --crop_size just fits into it")
    resize_face_size: int | None = option(
        None, "scale the picture so that the face's longer side has this many pixels", metavar="PIXELS", minimum=1
    )
    crop_size: str | None = option(None, "cut out this many pixels around the face", metavar="WIDTH,HEIGHT")
    crop_ratio: str | None = option(
        None, "cut out so many times the face's longer side around it, across and down", metavar="ACROSS,DOWN"
    )
    min_size: int | None = option(
        None, "leave out pictures whose shorter side has fewer pixels", metavar="PIXELS", minimum=1
    )
    max_size: int | None = option(
        None, "leave out pictures whose longer side has more pixels", metavar="PIXELS", minimum=1
    )
    multiple_faces: bool = option(False, "write one picture for each face, not only for the largest")
    debug: bool = option(False, "draw boxes around the faces, in files with debug in their names")
    model: str = option(
        DEFAULT_MODEL,
        "detector: an .onnx file, or owner/name or owner/name/path/in/it.onnx on the hub; YuNet or YOLO",
        metavar="MODEL",
    )
    score_threshold: float | None = option(
        None,
        "how sure of a face the detector has to be, 0 to 1; 0.9 for YuNet and 0.3 for YOLO when left out",
        metavar="SCORE",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.src_dir is None:
            raise UserError("--src_dir: the folder of pictures is not named")
        if self.dst_dir is None:
            raise UserError("--dst_dir: the folder for the results is not named")
        if None not in (self.crop, self.ratio):
            raise UserError("--crop_size and --crop_ratio contradict each other, drop one of them")
        if self.resize_fit and self.crop is None:
            raise UserError("--resize_fit: there is nothing to fit, add --crop_size")
        if self.resize_fit and self.resize_face_size is not None:
            raise UserError("--resize_fit and --resize_face_size contradict each other, drop one of them")
        if self.min_size and self.max_size and self.min_size > self.max_size:
            raise UserError(
                f"--min_size: {self.min_size} is more than --max_size {self.max_size}, no picture can be so"
            )
        if self.score_threshold is not None and self.score_threshold > 1:
            raise UserError(f"--score_threshold: {self.score_threshold} is too large, use 1 or less")

    @property
    def crop(self) -> tuple[int, int] | None:
        """--crop_size as numbers. UserError if it is not two of them."""
        if self.crop_size is None:
            return None
        found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", self.crop_size)
        if found is None or not (int(found[1]) and int(found[2])):
            raise UserError(f"--crop_size: {self.crop_size!r} is not written as width,height in pixels, as in 512,512")
        return int(found[1]), int(found[2])

    @property
    def ratio(self) -> tuple[float, float] | None:
        """--crop_ratio as numbers. UserError if it is not two of them."""
        if self.crop_ratio is None:
            return None
        found = re.fullmatch(r"\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*", self.crop_ratio)
        if found is None or not (float(found[1]) and float(found[2])):
            raise UserError(f"--crop_ratio: {self.crop_ratio!r} is not written as across,down, as in 2,2.5")
        return float(found[1]), float(found[2])
