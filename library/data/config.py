"""What is to be trained on: the dataset TOML or the folder convention -> one DatasetConfig per dataset."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.console import notice
from library.data.buckets import Buckets, Size
from library.data.files import folder_problem
from library.data.folders import image_folders
from library.errors import UserError, suggest
from library.options.dataset import DatasetOptions
from library.toml_file import read_toml


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images and how its captions are made."""

    image_dir: Path
    class_tokens: str
    num_repeats: int
    is_reg: bool
    caption_extension: str
    caption_separator: str
    shuffle_caption: bool
    keep_tokens: int
    flip_aug: bool
    place: str = field(default="", compare=False)
    """Where a dataset file describes it, for messages: `my.toml: datasets[0].subsets[1]`."""

    @property
    def name(self) -> str:
        """The folder's own name: what files that are passed on may say of where the data was."""
        return os.path.basename(os.path.abspath(self.image_dir))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution and are mixed in batches."""

    resolution: Size
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetConfig, ...]
    place: str = field(default="", compare=False)

    def buckets(self) -> Buckets:
        """The bucket arithmetic for this dataset's images."""
        return Buckets(
            self.resolution,
            enabled=self.enable_bucket,
            min_size=self.min_bucket_reso,
            max_size=self.max_bucket_reso,
            step=self.bucket_reso_steps,
            no_upscale=self.bucket_no_upscale,
        )

    def where(self, name: str) -> str:
        """How a message refers to one of this dataset's options."""
        return f"{self.place}.{name}" if self.place else f"--{_FLAGS.get(name, name)}"


def load_datasets(options: DatasetOptions, given: frozenset[str]) -> tuple[DatasetConfig, ...]:
    """The datasets of a run; `given` names the flags that the user set.

    Raises UserError for whatever can be known without looking at the images.
    """
    if options.dataset_config is not None:
        unused = [f"--{name}" for name in ("train_data_dir", "reg_data_dir") if name in given]
        if unused:
            notice(f"{' and '.join(unused)} ignored: --dataset_config {options.dataset_config} describes the datasets")
        return _from_file(options.dataset_config, _command_line(options))
    if options.train_data_dir is None:
        raise UserError("nothing to train on: give --train_data_dir, or --dataset_config with a dataset file")
    return (_from_folders(options, _command_line(options)),)


def check_resolutions(datasets: Sequence[DatasetConfig], step: int) -> None:
    """Raises UserError if a dataset makes images whose sides are not multiples of the model's `step` (pixels)."""

    def nearest(length: int) -> int:
        return max(step, (length + step // 2) // step * step)

    for dataset in datasets:
        right = tuple(nearest(length) for length in dataset.resolution)
        if right != dataset.resolution:
            raise UserError(
                f"{dataset.where('resolution')}: {_sides(dataset.resolution)} does not fit this model, which needs "
                f"multiples of {step}, the nearest is {_sides(right)}"
            )
        if dataset.enable_bucket and dataset.bucket_reso_steps % step:
            raise UserError(
                f"{dataset.where('bucket_reso_steps')}: {dataset.bucket_reso_steps} does not fit this model, which "
                f"needs a multiple of {step}, the nearest is {nearest(dataset.bucket_reso_steps)}"
            )


class _Unfit(Exception):
    """A value that an option cannot have. The text says what it must be."""


# Readers turn the value of an option into what the program uses, or raise _Unfit.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unfit("must be a text in quotes")
    return value


def _extension(value: Any) -> str:
    text = _text(value)
    return f".{text}" if text.isalnum() else text


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Unfit("must be true or false")
    return value


def _whole(minimum: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise _Unfit(f"must be a whole number, {minimum} or more")
        return value

    return read


def _resolution(value: Any) -> Size:
    """One number for a square, or width and height: as numbers in a dataset file, as `512,768` on the command line."""
    sides = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        sides = [int(side) if isinstance(side, str) else side for side in sides]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise _Unfit(
            "must be one size in pixels or width and height: 512, in a dataset file [512, 768], as a flag 512,768"
        )
    return sides[0], sides[-1]


_Readers = Mapping[str, Callable[[Any], Any]]
_OF_DATASET: _Readers = {
    "resolution": _resolution,
    "batch_size": _whole(1),
    "enable_bucket": _switch,
    "min_bucket_reso": _whole(1),
    "max_bucket_reso": _whole(1),
    "bucket_reso_steps": _whole(1),
    "bucket_no_upscale": _switch,
}
_INHERITED_BY_SUBSET: _Readers = {
    "class_tokens": _text,
    "num_repeats": _whole(0),
    "caption_extension": _extension,
    "caption_separator": _text,
    "shuffle_caption": _switch,
    "keep_tokens": _whole(0),
    "flip_aug": _switch,
}
_OF_SUBSET: _Readers = {"image_dir": _text, "is_reg": _switch, **_INHERITED_BY_SUBSET}
_OF_GENERAL: _Readers = {**_OF_DATASET, **_INHERITED_BY_SUBSET}

_FLAGS = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
_NO_FLAG = {"class_tokens": "", "is_reg": False}


def _command_line(options: DatasetOptions) -> dict[str, Any]:
    """What holds where a dataset file says nothing."""
    values = dict(_NO_FLAG)
    for name, read in _OF_GENERAL.items():
        if name in _NO_FLAG:
            continue
        flag = _FLAGS.get(name, name)
        value = getattr(options, flag)
        if value is None:
            continue
        try:
            values[name] = read(value)
        except _Unfit as problem:
            raise UserError(f"--{flag}={value}: {problem}") from None
    return values


def _from_folders(options: DatasetOptions, values: dict[str, Any]) -> DatasetConfig:
    roots = [("--train_data_dir", options.train_data_dir, False), ("--reg_data_dir", options.reg_data_dir, True)]
    subsets = [
        _subset(
            {**values, "class_tokens": folder.class_tokens, "num_repeats": folder.repeats, "is_reg": is_reg},
            folder.path,
        )
        for flag, root, is_reg in roots
        if root is not None
        for folder in image_folders(root, flag)
    ]
    return _dataset(values, subsets, place="")


def _from_file(path: Path, values: dict[str, Any]) -> tuple[DatasetConfig, ...]:
    content = read_toml(path, "dataset file")
    general = _checked(_table(content.pop("general", {}), f"{path}: general"), _OF_GENERAL, f"{path}: general")
    tables = _tables(content.pop("datasets", []), f"{path}: datasets")
    for key in content:
        raise UserError(f"{path}: {key}: unknown section{suggest(key, ('general', 'datasets'))}")
    if not tables:
        raise UserError(
            f"{path}: describes no datasets: start one with [[datasets]] and its folders with [[datasets.subsets]]"
        )
    datasets = []
    for index, table in enumerate(tables):
        place = f"{path}: datasets[{index}]"
        subset_tables = _tables(table.pop("subsets", []), f"{place}.subsets")
        dataset_values = {**values, **general, **_checked(table, _OF_GENERAL, place)}
        subsets = _subsets_from_file(subset_tables, dataset_values, place)
        datasets.append(_dataset(dataset_values, subsets, place))
    return tuple(datasets)


def _subsets_from_file(tables: list[dict], values: dict[str, Any], dataset_place: str) -> list[SubsetConfig]:
    if not tables:
        raise UserError(f"{dataset_place}: has no images: add [[datasets.subsets]] with image_dir")
    subsets = []
    seen = set()
    for index, table in enumerate(tables):
        place = f"{dataset_place}.subsets[{index}]"
        own = _checked(table, _OF_SUBSET, place)
        if "image_dir" not in own:
            raise UserError(f"{place}: image_dir, the folder of its images, is missing")
        image_dir = Path(own.pop("image_dir")).expanduser()
        problem = folder_problem(image_dir)
        if problem:
            raise UserError(f"{place}.image_dir: {problem}")
        identity = os.path.normcase(os.path.realpath(image_dir))
        subset = _subset({**values, **own}, image_dir, place)
        if identity in seen:
            notice(f"{place} is left out: its dataset has {image_dir} already")
        elif subset.num_repeats == 0:
            notice(f"{place} is left out: its num_repeats is 0")
        else:
            seen.add(identity)
            subsets.append(subset)
    return subsets


def _subset(values: dict[str, Any], image_dir: Path, place: str = "") -> SubsetConfig:
    own = {name: values[name] for name in _OF_SUBSET if name != "image_dir"}
    return SubsetConfig(image_dir=image_dir, place=place, **own)


def _dataset(values: dict[str, Any], subsets: list[SubsetConfig], place: str) -> DatasetConfig:
    if "resolution" not in values:
        where = f"{place}.resolution is missing: set it there or" if place else "the training resolution is missing:"
        raise UserError(f"{where} give --resolution, as --resolution=512")
    dataset = DatasetConfig(subsets=tuple(subsets), place=place, **{name: values[name] for name in _OF_DATASET})
    return _with_whole_steps(dataset) if dataset.enable_bucket and not dataset.bucket_no_upscale else dataset


def _with_whole_steps(dataset: DatasetConfig) -> DatasetConfig:
    """The smallest and largest bucket side moved outwards to whole steps, and compared with the resolution."""
    step = dataset.bucket_reso_steps
    low = max(step, dataset.min_bucket_reso // step * step)
    high = -(-dataset.max_bucket_reso // step) * step
    for name, used in (("min_bucket_reso", low), ("max_bucket_reso", high)):
        asked = getattr(dataset, name)
        if asked != used:
            notice(f"{dataset.where(name)}: {used} instead of {asked} is used, a multiple of bucket_reso_steps {step}")
    if low > high:
        raise UserError(f"{dataset.where('min_bucket_reso')}: {low} is more than max_bucket_reso, which is {high}")
    if low > min(dataset.resolution):
        raise UserError(
            f"{dataset.where('min_bucket_reso')}: {low} is more than the resolution {_sides(dataset.resolution)}, "
            f"use {min(dataset.resolution)} or less"
        )
    if high < max(dataset.resolution):
        raise UserError(
            f"{dataset.where('max_bucket_reso')}: {high} is less than the resolution {_sides(dataset.resolution)}, "
            f"use {max(dataset.resolution)} or more"
        )
    return replace(dataset, min_bucket_reso=low, max_bucket_reso=high)


def _sides(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]},{size[1]}"


def _table(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: must be a table of options")
    return value


def _tables(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        name = place.rpartition(": ")[2].replace("[0]", "")
        raise UserError(f"{place}: must be a list of tables, each started with two pairs of brackets, as [[{name}]]")
    return [_table(item, f"{place}[{index}]") for index, item in enumerate(value)]


def _checked(table: dict[str, Any], readers: _Readers, place: str) -> dict[str, Any]:
    """The values of a table by option. Raises UserError naming the place for an unknown name or an unfit value."""
    values = {}
    for name, value in table.items():
        if name not in readers:
            raise UserError(f"{place}.{name}: {_why_unknown(name, readers)}")
        try:
            values[name] = readers[name](value)
        except _Unfit as problem:
            raise UserError(f"{place}.{name}: {value!r} {problem}") from None
    return values


def _why_unknown(name: str, readers: _Readers) -> str:
    if name in _OF_DATASET:
        return "is an option of a whole dataset, move it to [[datasets]] or [general]"
    if name in _OF_SUBSET:
        return "is an option of a single folder, move it to [[datasets.subsets]]"
    return f"unknown option{suggest(name, readers)}"
