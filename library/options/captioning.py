"""What all captioners are asked."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.options.base import option

PRECISIONS = ("float", "fp16", "bf16")
_OF_THE_WORK = ("train_data_dir", "recursive", "caption_extension", "batch_size", "device", "debug")
_MODELS = ("caption_weights", "model_id")


@dataclass(frozen=True)
class CaptioningOptions:
    """Which pictures get captions, where those are written, and what computes them."""

    train_data_dir: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "folder of the pictures", positional=True
    )
    recursive: bool = option(False, "also take the pictures in all folders below it")
    caption_extension: str = option(
        ".caption", "ending of the files with the captions", metavar=".EXT", aliases=("caption_extention",)
    )
    batch_size: int = option(
        1, "pictures captioned at once: faster on a GPU as long as its memory suffices", metavar="N", minimum=1
    )
    debug: bool = option(False, "print each picture's caption when it is made")
    precision: str = option(
        "float", "number format of the model: fp16 and bf16 take half the memory", metavar="FORMAT", choices=PRECISIONS
    )
    device: str | None = option(
        None, "what computes: cpu, cuda, cuda:1, mps ...; a GPU if there is one when left out", metavar="DEVICE"
    )

    def __post_init__(self) -> None:
        if self.train_data_dir is None:
            raise UserError("train_data_dir: the folder of the pictures is not given")

    @property
    def purpose(self) -> dict[str, Any]:
        """What the captions depend on, by flag: not which pictures get one, nor how fast; a folder however written."""
        purpose = {name: value for name, value in asdict(self).items() if name not in _OF_THE_WORK}
        folders = {name: purpose[name] for name in _MODELS if purpose.get(name) and os.path.isdir(purpose[name])}
        return purpose | {name: os.path.realpath(folder) for name, folder in folders.items()}
