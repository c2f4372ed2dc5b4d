"""The options of datasets and subsets by name, and what their values may be, in a dataset file and as flags."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.data.buckets import Size
from library.data.scanning.files import folder_problem
from library.errors import UserError, nearest, suggest, suggest_path
from library.options.dataset import INTERPOLATIONS

Values = dict[str, Any]
"""Values by option, as the program uses them."""
Reader = Callable[[Any], Any]
"""Turns the value of an option into what the program uses, or raises Unfit."""
PRESERVES = "diff_output_preservation"
"""The one of `custom_attributes` that has a meaning here: what the model says of these samples is to stay as it is."""
_CLOSE = 0.85  # names that are so much like it are slips


class Unfit(Exception):
    """A value that an option cannot have. The text says what it must be."""


class NotThere(Unfit):
    """A path that leads nowhere. The text is a sentence that names it."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("must be a text in quotes")
    return value


def _separator(value: Any) -> str:
    if not _text(value):
        raise Unfit("must be a text of at least one character")
    return value


def _extension(value: Any) -> str:
    text = _text(value)
    return f".{text}" if text.isalnum() else text


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("must be true or false")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:  # a bool is an int to isinstance
        raise Unfit("must be a whole number")
    return value


def _whole(minimum: int) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or value < minimum:
            raise Unfit(f"must be a whole number, {minimum} or more")
        return value

    return read


def _number(which: str, fits: Callable[[float], bool] = lambda number: True) -> Reader:
    def read(value: Any) -> int | float:
        if type(value) not in (int, float) or not math.isfinite(value) or not fits(value):
            raise Unfit(f"must be a number{which}")
        return int(value) if value == int(value) else value

    return read


_not_negative = _number(", 0 or more", lambda number: number >= 0)
_rate = _number(" from 0 to 1", lambda number: 0 <= number <= 1)
_split = _number(" from 0 to less than 1", lambda number: 0 <= number < 1)


def _resolution(value: Any) -> Size:
    """One number for a square, or width and height: as numbers in a dataset file, as `512,768` on the command line."""
    sides = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        sides = [int(side) if isinstance(side, str) else side for side in sides]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise Unfit(
            "must be one size in pixels or width and height: 512, in a dataset file [512, 768], as a flag 512,768"
        )
    return sides[0], sides[-1]


def _face_range(value: Any) -> tuple[float, float] | None:
    """`[1.0, 3.0]` or `1.0,3.0`; an empty text switches it off."""
    if value == "":
        return None
    ends = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    try:
        ends = [float(end) for end in ends if not isinstance(end, bool)]
    except (TypeError, ValueError):
        ends = []
    if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
        raise Unfit("must be two numbers above 0, the smaller one first: [1.0, 3.0], as a flag 1.0,3.0")
    return ends[0], ends[1]


def _interpolation(value: Any) -> str | None:
    """A method by name; an empty text is the default."""
    if value == "":
        return None
    if value not in INTERPOLATIONS:
        raise Unfit(f"must be one of {', '.join(INTERPOLATIONS)}{suggest(str(value), INTERPOLATIONS)}")
    return value


def _folder(value: Any) -> Path:
    if not _text(value):
        raise Unfit("must name a folder")
    folder = Path(value).expanduser()
    problem = folder_problem(folder)
    if problem:
        raise NotThere(problem)
    return folder


def _folder_or_none(value: Any) -> Path | None:
    """An empty text switches it off."""
    return None if value == "" else _folder(value)


def _metadata_file(value: Any) -> Path:
    if not _text(value):
        raise Unfit("must name a metadata file")
    path = Path(value).expanduser()
    if not path.is_file():
        wrong = f"{path} is a folder, not a metadata file" if path.is_dir() else f"there is no metadata file {path}"
        raise NotThere(f"{wrong}{suggest_path(path, ['.json'])}")
    return path


def _attributes(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unfit("must be a table, as { artist = 'me' }")
    if not isinstance(value.get(PRESERVES, False), bool):
        raise Unfit(f"must have true or false, without quotes, as {PRESERVES}")
    for name in value:
        if name != PRESERVES and nearest(name.lower(), [PRESERVES], cutoff=_CLOSE):
            raise Unfit(f"must have another name than {name} for what is yours, did you mean {PRESERVES}?")
    return value


OF_DATASET: Mapping[str, Reader] = {
    "resolution": _resolution,
    "batch_size": _whole(1),
    "enable_bucket": _switch,
    "min_bucket_reso": _whole(1),
    "max_bucket_reso": _whole(1),
    "bucket_reso_steps": _whole(1),
    "bucket_no_upscale": _switch,
    "skip_image_resolution": _resolution,
    "network_multiplier": _number(""),
}
INHERITED: Mapping[str, Reader] = {
    "class_tokens": _text,
    "caption_extension": _extension,
    "cache_info": _switch,
    "num_repeats": _not_negative,
    "images_per_epoch": _whole(1),
    "weight": _not_negative,
    "conditioning_data_dir": _folder_or_none,
    "validation_split": _split,
    "validation_seed": _integer,
    "custom_attributes": _attributes,
    "caption_separator": _separator,
    "keep_tokens": _whole(0),
    "keep_tokens_separator": _text,
    "secondary_separator": _text,
    "shuffle_caption": _switch,
    "enable_wildcard": _switch,
    "caption_prefix": _text,
    "caption_suffix": _text,
    "caption_dropout_rate": _rate,
    "caption_dropout_every_n_epochs": _whole(0),
    "caption_tag_dropout_rate": _rate,
    "token_warmup_min": _whole(0),
    "token_warmup_step": _not_negative,
    "flip_aug": _switch,
    "color_aug": _switch,
    "random_crop": _switch,
    "face_crop_aug_range": _face_range,
    "resize_interpolation": _interpolation,
    "alpha_mask": _switch,
    "legacy_image_decode": _switch,
}
"""Options of a subset that may stand in its dataset or in [general] as well."""
OF_SUBSET: Mapping[str, Reader] = {
    "image_dir": _folder,
    "metadata_file": _metadata_file,
    "is_reg": _switch,
    **INHERITED,
}
OF_GENERAL: Mapping[str, Reader] = {**OF_DATASET, **INHERITED}
_ALL: Mapping[str, Reader] = {**OF_DATASET, **OF_SUBSET}
DREAMBOOTH_ONLY = ("class_tokens", "is_reg", "caption_extension", "cache_info")
"""Options without a meaning where a metadata file has the captions."""

_FLAGS = {
    "batch_size": "train_batch_size",
    "num_repeats": "dataset_repeats",
    "image_dir": "train_data_dir",
    "metadata_file": "in_json",
}


def flag(name: str) -> str:
    """The flag that stands for an option on the command line."""
    return f"--{_FLAGS.get(name, name)}"


def from_flag(name: str, value: Any) -> Any:
    """The value of an option of a subset or dataset that was given as a flag. Raises UserError naming the flag."""
    return _read(_ALL[name], value, flag(name), f"{flag(name)}={value}:")


def from_table(table: Mapping[str, Any], readers: Mapping[str, Reader], place: str) -> Values:
    """The values in a table of a dataset file; JSON's null says nothing.

    Raises UserError naming the place for an unknown name or an unfit value.
    """
    values = {}
    for name, value in table.items():
        where = f"{place}.{name}"
        if name not in readers:
            raise UserError(f"{where}: {_why_unknown(name, readers)}")
        if value is not None:
            values[name] = _read(readers[name], value, where, f"{where}: {value!r}")
    return values


def _read(reader: Reader, value: Any, where: str, where_with_value: str) -> Any:
    try:
        return reader(value)
    except NotThere as problem:
        raise UserError(f"{where}: {problem}") from None
    except Unfit as problem:
        raise UserError(f"{where_with_value} {problem}") from None


def _why_unknown(name: str, readers: Mapping[str, Reader]) -> str:
    if name in OF_DATASET:
        return "is an option of a whole dataset, move it to [[datasets]] or [general]"
    if name in OF_SUBSET:
        return "is an option of a single folder, move it to [[datasets.subsets]]"
    return f"unknown option{suggest(name, readers)}"
