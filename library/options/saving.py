"""Where the result goes, and what is kept on the way."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class SaveOptions:
    """Output files. An interval of 0 is the same as none, and both intervals act together."""

    title: ClassVar[str] = "saving"

    output_dir: str | None = option(None, "folder the trained files are written to; made if missing", metavar="FOLDER")
    output_name: str | None = option(
        None, "file name without extension; `last` for the final file when left out", metavar="NAME"
    )
    save_precision: str | None = option(
        None,
        "number format of saved weights; that of training when left out",
        metavar="FORMAT",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = option(None, "also save after every N epochs", metavar="N", minimum=0)
    save_every_n_steps: int | None = option(None, "also save after every N optimizer steps", metavar="N", minimum=0)
    save_model_as: str = option(
        "safetensors", "format of saved files", metavar="FORMAT", choices=("ckpt", "pt", "safetensors")
    )

    def __post_init__(self) -> None:
        if self.output_name and any(separator in self.output_name for separator in "/\\"):
            raise UserError(f"--output_name: {self.output_name} is a path, give the folder as --output_dir")

    @property
    def name(self) -> str:
        """The final file's name without extension."""
        return self.output_name or "last"
