"""Which images and captions are trained on, and in what shape they reach the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class DatasetOptions:
    """The dataset. A dataset file overrules what is set here."""

    title: ClassVar[str] = "dataset"

    train_data_dir: str | None = option(
        None, "folder that holds the image folders, each named <repeats>_<class tokens>", metavar="FOLDER"
    )
    reg_data_dir: str | None = option(
        None, "the same for regularisation images, which keep the model's idea of the class", metavar="FOLDER"
    )
    dataset_config: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "TOML file describing the datasets; takes the place of the two folders above", metavar="FILE"
    )
    dataset_repeats: int = option(
        1, "repeats of subsets in --dataset_config that do not set num_repeats", metavar="N", minimum=1
    )
    resolution: str | None = option(None, "training resolution in pixels, as SIZE or WIDTH,HEIGHT", metavar="SIZE")
    train_batch_size: int = option(1, "images per micro-batch on each device", metavar="N", minimum=1)
    enable_bucket: bool = option(
        False, "keep each image's aspect ratio: group images into buckets of about the area of --resolution"
    )
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels", metavar="N", minimum=1)
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels", metavar="N", minimum=1)
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this many pixels", metavar="N", minimum=1)
    bucket_no_upscale: bool = option(False, "never enlarge an image; small ones get buckets of their own size")
    caption_extension: str = option(
        ".caption", "extension of the caption files beside the images", metavar="EXT", aliases=("caption_extention",)
    )
    caption_separator: str = option(",", "what separates the tags of a caption", metavar="TEXT")
    shuffle_caption: bool = option(False, "put the tags of a caption in a new order each time it is used")
    keep_tokens: int = option(
        0, "first tags of a caption that --shuffle_caption leaves in place", metavar="N", minimum=0
    )
    flip_aug: bool = option(False, "mirror images half of the time; not for subjects that are not symmetric")
