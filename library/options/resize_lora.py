"""Making networks smaller."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class ResizeLoraOptions:
    """Which network is resized, and how small it becomes."""

    title: ClassVar[str] = "resizing networks"

    model: str | None = option(None, "the network to resize, .safetensors or .ckpt", metavar="FILE")
    save_to: str | None = option(None, "file to write, .safetensors or .ckpt", metavar="FILE")
    new_rank: int = option(4, "rank of the result, with --dynamic_method the largest one", metavar="RANK", minimum=1)
    new_conv_rank: int | None = option(
        None, "the same for convolutions larger than 1x1; --new_rank when left out", metavar="RANK", minimum=1
    )
    dynamic_method: str | None = option(
        None,
        "choose each layer's rank: sv_ratio keeps the singular values that are at least the largest one divided by "
        "--dynamic_param; sv_cumulative and sv_fro keep as many as hold that share of their sum, or of their "
        "Frobenius norm",
        metavar="METHOD",
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
    )
    dynamic_param: float | None = option(
        None, "of --dynamic_method: a ratio of 1 or more, or a share from 0 to 1", metavar="NUMBER"
    )
    save_precision: str | None = option(
        None,
        "number format of the result; that of the network when left out",
        metavar="FORMAT",
        choices=("float", "fp16", "bf16"),
    )
    device: str | None = option(None, "where it is computed: cpu (the default), cuda, cuda:1 ...")
    verbose: bool = option(False, "tell of each layer what becomes of it")

    def __post_init__(self) -> None:
        if self.model is None:
            raise UserError("--model: no network is given, give the file to resize")
        if self.save_to is None:
            raise UserError("--save_to: the file to write is not named, give a name ending in .safetensors or .ckpt")
        self._check_dynamic()

    def _check_dynamic(self) -> None:
        method, param = self.dynamic_method, self.dynamic_param
        if method is None and param is not None:
            raise UserError("--dynamic_param: nothing is chosen by it without --dynamic_method, add that or drop it")
        if method is not None and param is None:
            raise UserError(f"--dynamic_method {method}: by what value it chooses is not said, add --dynamic_param")
        if method == "sv_ratio" and param < 1:
            raise UserError(
                f"--dynamic_param: {param:g} is no ratio of the largest singular value to the smallest one that is "
                "kept, use 1 or more for --dynamic_method sv_ratio"
            )
        if method in ("sv_fro", "sv_cumulative") and not 0 <= param <= 1:
            raise UserError(f"--dynamic_param: {param:g} is no share, use 0 to 1 for --dynamic_method {method}")

    @property
    def source(self) -> Path:
        """The file that is read."""
        return Path(self.model)

    @property
    def target(self) -> Path:
        """The file that is written."""
        return Path(self.save_to)

    @property
    def conv_rank(self) -> int:
        """The rank of convolutions larger than 1x1."""
        return self.new_rank if self.new_conv_rank is None else self.new_conv_rank
