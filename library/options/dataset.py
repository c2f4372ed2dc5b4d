"""Which images and captions are trained on, and in what shape they reach the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


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
    in_json: str | None = option(
        None, "metadata file with the captions of the images, which lie directly in --train_data_dir", metavar="FILE"
    )
    dataset_config: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "TOML or JSON file describing the datasets; takes the place of the folders above", metavar="FILE"
    )
    dataset_class: str | None = option(None, "dataset classes of your own are not supported", metavar="CLASS")
    dataset_repeats: int = option(
        1,
        "repeats of the images of --in_json, and of subsets in --dataset_config without num_repeats",
        metavar="N",
        minimum=1,
    )
    cache_info: bool = option(
        False, "keep an index of image sizes and captions in each image folder, for a quicker start next time"
    )
    debug_dataset: bool = option(
        False, "write a web page that shows what the model would see, print its path, and exit without training"
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
    keep_tokens: int = option(0, "first tags of a caption that are neither moved nor dropped", metavar="N", minimum=0)
    keep_tokens_separator: str = option(
        "", "mark in a caption, such as |||, before which (and after a second one) all tags stay", metavar="TEXT"
    )
    secondary_separator: str | None = option(
        None, "mark, such as ;;;, between tags that move and drop together; becomes the separator", metavar="TEXT"
    )
    enable_wildcard: bool = option(False, "draw one line of a caption with several, and one choice of each {a|b} in it")
    caption_prefix: str | None = option(None, "text in front of every caption", metavar="TEXT")
    caption_suffix: str | None = option(None, "text at the end of every caption", metavar="TEXT")
    caption_dropout_rate: float = option(
        0.0, "share of uses in which an image is trained with an empty caption", metavar="RATE", minimum=0
    )
    caption_dropout_every_n_epochs: int = option(
        0, "train all images with empty captions in every Nth epoch; 0 for never", metavar="N", minimum=0
    )
    caption_tag_dropout_rate: float = option(
        0.0, "chance of each tag to be left out of a use", metavar="RATE", minimum=0
    )
    token_warmup_min: int = option(1, "tags that a caption starts with in token warm-up", metavar="N", minimum=0)
    token_warmup_step: float = option(
        0,
        "steps until all tags of a caption are used, below 1 a share of the run's; 0 for at once",
        metavar="STEPS",
        minimum=0,
    )

    flip_aug: bool = option(False, "mirror images half of the time; not for subjects that are not symmetric")
    color_aug: bool = option(False, "change the colours of images a little each time they are used")
    random_crop: bool = option(False, "cut images at a random place instead of around their middle")
    face_crop_aug_range: str | None = option(
        None, "cut around the face that the file name tells of, at MIN to MAX times its size", metavar="MIN,MAX"
    )
    resize_interpolation: str | None = option(
        None,
        "how images are resized; by default area when shrinking and lanczos when growing",
        metavar="METHOD",
        choices=INTERPOLATIONS,
    )
    legacy_image_decode: bool = option(
        False, "read images as older tools did: no colour profiles, no turning, transparency ignored"
    )

    alpha_mask: bool = option(False, "weigh the loss by the images' transparency")
    masked_loss: bool = option(False, "weigh the loss by the masks in conditioning_data_dir")
    conditioning_data_dir: str | None = option(
        None, "folder of masks for all images, with the same names", metavar="FOLDER"
    )

    validation_split: float = option(
        0.0, "share of each folder's images that is held out of the training", metavar="SHARE", minimum=0
    )
    validation_seed: int | None = option(None, "which images are held out", metavar="N")

    def __post_init__(self) -> None:
        if self.dataset_class:
            raise UserError(
                f"--dataset_class: {self.dataset_class} cannot be used, dataset classes of your own are not supported: "
                "leave it out and describe the data in a file for --dataset_config"
            )
