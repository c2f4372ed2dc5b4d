"""Latents and training sizes ahead of fine-tuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class PrepareLatentsOptions:
    """Which pictures are encoded with which model, at which sizes, and which metadata tells of it."""

    title: ClassVar[str] = "latents and buckets"

    train_data_dir: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "folder of the pictures; the latents are written beside them", positional=True
    )
    in_json: Path | None = option(  # noqa: RUF009
        None, "metadata file of the pictures", positional=True
    )
    out_json: Path | None = option(  # noqa: RUF009
        None, "metadata file to write, which may be the same: what was read, with train_resolution", positional=True
    )
    model_name_or_path: str | None = option(
        None, "the model to be trained: a file, a folder, or owner/name on the hub", positional=True
    )
    v2: bool = option(False, "the model is a Stable Diffusion 2.x model; recognised without it, too")
    vae: str | None = option(
        None,
        "take the autoencoder from here, as training with the same flag does: a file, a folder, or owner/name",
        metavar="MODEL",
    )
    batch_size: int = option(1, "pictures the VAE encodes at a time", metavar="N", minimum=1)
    max_resolution: str = option("512,512", "training resolution in pixels, as WIDTH,HEIGHT or SIZE", metavar="SIZE")
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels", metavar="N", minimum=1)
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels", metavar="N", minimum=1)
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this many pixels", metavar="N", minimum=1)
    bucket_no_upscale: bool = option(False, "never enlarge a picture; small ones get buckets of their own size")
    mixed_precision: str = option(
        "no", "number format the VAE computes in", metavar="FORMAT", choices=("no", "fp16", "bf16")
    )
    no_half_vae: bool = option(False, "run the VAE in float32 whatever --mixed_precision says; some overflow in fp16")
    full_path: bool = option(
        False, "the metadata has pictures by their whole paths, not by names; needed for several folders"
    )
    flip_aug: bool = option(False, "encode the mirrored pictures, too, for training with --flip_aug")
    alpha_mask: str = option(
        "", "any text: keep the pictures' transparency, too, for training with --alpha_mask", metavar="TEXT"
    )
    skip_existing: bool = option(False, "trust files of latents that are there without looking into them")
    recursive: bool = option(False, "also pictures in the folders below; needs --full_path")

    def __post_init__(self) -> None:
        if self.recursive and not self.full_path:
            raise UserError(
                "--recursive: pictures of several folders can have one name: add --full_path, and give the metadata "
                "whole paths"
            )
        self.resolution  # noqa: B018 - is understood, or refused

    @property
    def resolution(self) -> tuple[int, int]:
        """--max_resolution as (width, height)."""
        sides = self.max_resolution.split(",")
        if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
            raise UserError(
                f"--max_resolution: {self.max_resolution!r} must be one size in pixels or width and height, as 512 or "
                "512,768"
            )
        return int(sides[0]), int(sides[-1])
