"""Small image folders for tests of the data room."""

from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.captions import CaptionOptions
from library.data.config import DatasetConfig, SubsetConfig
from library.data.images import ImageOptions


def picture(
    path: Path, size: tuple[int, int] = (64, 64), caption: str | None = None, extension: str = ".caption"
) -> Path:
    """A noise image whose pixels depend on its name, and its caption file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(extension).write_text(caption, encoding="utf-8")
    return path


def subset(image_dir: Path, **options) -> SubsetConfig:
    """A subset with the defaults of the command line; options of its captions and images are given by name alike."""
    groups = {
        name: kind(**{f.name: options.pop(f.name) for f in fields(kind) if f.name in options})
        for name, kind in (("captions", CaptionOptions), ("images", ImageOptions))
    }
    return SubsetConfig(image_dir=image_dir, **groups, **options)


def dataset(*subsets: SubsetConfig, **options) -> DatasetConfig:
    """A dataset around 64x64 pixels with buckets in steps of 16."""
    defaults = {
        "resolution": (64, 64),
        "batch_size": 2,
        "enable_bucket": True,
        "min_bucket_reso": 32,
        "max_bucket_reso": 128,
        "bucket_reso_steps": 16,
        "bucket_no_upscale": False,
    }
    return DatasetConfig(subsets=subsets, **(defaults | options))
