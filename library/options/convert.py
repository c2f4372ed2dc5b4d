"""Converting models between single files and Diffusers folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option
from library.suffixes import WEIGHTS_SUFFIXES
from library.tool_files import check_ending

_FORMATS = ("fp16", "bf16", "float")


@dataclass(frozen=True)
class ConvertOptions:
    """Which model is written as what."""

    title: ClassVar[str] = "converting models"

    model_to_load: str | None = option(None, "model: a file, a folder, or owner/name on the hub", positional=True)
    model_to_save: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "what to write: a file by its ending, .safetensors or .ckpt, else a folder", positional=True
    )
    v1: bool = option(False, "refuse anything but Stable Diffusion 1.x; which model it is shows in it")
    v2: bool = option(False, "refuse anything but Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts v, and what is written says so")
    unet_use_linear_projection: bool = option(
        False, "has no effect: what kind of projections there are shows in the model"
    )
    fp16: bool = option(False, "load the weights as fp16")
    bf16: bool = option(False, "load the weights as bf16")
    float: bool = option(False, "load the weights as float32; as they are stored when no format is given")
    save_precision_as: str = option("no", "number format of what is written", metavar="FORMAT", choices=_FORMATS)
    epoch: int = option(0, "number of epochs to note in a file", metavar="NUMBER", minimum=0)
    global_step: int = option(0, "number of steps to note in a file", metavar="NUMBER", minimum=0)
    metadata: str | None = option(None, "metadata for what is written, as a JSON object", metavar="JSON")
    variant: str | None = option(None, "which weights of a folder are read first, as in fp16", metavar="NAME")
    vae: str | None = option(
        None, "file, folder or owner/name of an autoencoder to write instead of the model's own", metavar="VAE"
    )
    reference_model: str | None = option(
        None, "folder or owner/name that tokenizers and scheduler of a folder are copied from", metavar="MODEL"
    )
    use_safetensors: bool = option(False, "write the weights of a folder as .safetensors instead of .bin")

    def __post_init__(self) -> None:
        if self.v1 and self.v2:
            raise UserError("--v1 and --v2: a model cannot be both, leave both out")
        given = [f"--{name}" for name in _FORMATS if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: weights are loaded in one format, give one of them")
        self.fields()
        if self.model_to_save is not None:
            check_ending("model_to_save", self.model_to_save)

    @property
    def to_file(self) -> bool:
        """Whether a single file is written."""
        return self.model_to_save.suffix.lower() in WEIGHTS_SUFFIXES

    @property
    def loaded_as(self) -> str | None:
        """The number format that weights are loaded in; None is as they are."""
        return next((name for name in _FORMATS if getattr(self, name)), None)

    @property
    def saved_as(self) -> str | None:
        """The number format that weights are written in; None is as they are loaded."""
        return None if self.save_precision_as == "no" else self.save_precision_as

    @property
    def counts(self) -> dict[str, int]:
        """The numbers to note in a file; none if neither is asked for."""
        counts = {"epoch": self.epoch, "global_step": self.global_step}
        return counts if any(counts.values()) else {}

    def fields(self) -> dict[str, str]:
        """The metadata that are asked for."""
        try:
            given = json.loads(self.metadata) if self.metadata else {}
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise UserError(f"""--metadata: {self.metadata} is no JSON object, write it as '{{"title": "my model"}}'""")
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
