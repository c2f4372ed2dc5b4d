"""The dataset file, TOML or JSON -> one table of values per dataset and subset, with what each inherits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.config_values import OF_GENERAL, OF_SUBSET, Reader, Values, from_table
from library.errors import UserError, suggest
from library.toml_file import read_json, read_toml

_WHAT = "dataset file"
_SUFFIXES = (".toml", ".json")
_SECTIONS = ("general", "datasets")


@dataclass(frozen=True)
class SubsetTable:
    """One of `[[datasets.subsets]]`."""

    place: str
    own: Values
    """What stands in this table itself."""
    values: Values
    """What holds for it: its own, its dataset's, those of [general] and of the command line, the nearest of each."""


@dataclass(frozen=True)
class DatasetTable:
    """One of `[[datasets]]`."""

    place: str
    own: Values
    values: Values
    subsets: tuple[SubsetTable, ...]


def read_dataset_file(path: Path, command_line: Values) -> list[DatasetTable]:
    """The datasets that a file describes; `command_line` holds where it says nothing.

    Raises UserError naming file and place for whatever is not as it must be.
    """
    read = read_json if path.suffix.lower() == ".json" else read_toml
    content = _table(read(path, _WHAT, _SUFFIXES), f"{path}")
    for key in content:
        if key not in _SECTIONS:
            raise UserError(f"{path}: {key}: unknown section{suggest(key, _SECTIONS)}")
    general = _table(content.get("general"), f"{path}: general")
    inherited = _layered(command_line, _own(general, OF_GENERAL, f"{path}: general"))
    tables = _tables(content.get("datasets"), f"{path}: datasets")
    if not tables:
        raise UserError(
            f"{path}: describes no datasets: start one with [[datasets]] and its folders with [[datasets.subsets]]"
        )
    return [_dataset(table, inherited, f"{path}: datasets[{index}]") for index, table in enumerate(tables)]


def _dataset(table: Mapping[str, Any], inherited: Values, place: str) -> DatasetTable:
    options = {name: value for name, value in table.items() if name != "subsets"}
    own = _own(options, OF_GENERAL, place)
    values = _layered(inherited, own)
    subsets = []
    for index, subset in enumerate(_tables(table.get("subsets"), f"{place}.subsets")):
        subset_place = f"{place}.subsets[{index}]"
        subset_own = _own(subset, OF_SUBSET, subset_place)
        subsets.append(SubsetTable(subset_place, subset_own, _layered(values, subset_own)))
    if not subsets:
        raise UserError(f"{place}: has no images: add [[datasets.subsets]] with image_dir")
    return DatasetTable(place, own, values, tuple(subsets))


def _own(table: Mapping[str, Any], readers: Mapping[str, Reader], place: str) -> Values:
    values = from_table(table, readers, place)
    if "num_repeats" in values and "images_per_epoch" in values:
        raise UserError(f"{place}: num_repeats and images_per_epoch say the same in two ways, drop one of them")
    return values


def _layered(outer: Values, own: Values) -> Values:
    """A table's own values over those around it. Of custom_attributes each one by itself is overruled."""
    values = {**outer, **own}
    if "num_repeats" in own and "images_per_epoch" not in own:
        values.pop("images_per_epoch", None)  # the nearer of the two ways to say how often counts
    if "custom_attributes" in own:
        values["custom_attributes"] = {**outer.get("custom_attributes", {}), **own["custom_attributes"]}
    return values


def _table(value: Any, place: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{place}: must be a table of options")
    return value or {}


def _tables(value: Any, place: str) -> list[dict[str, Any]]:
    if value is not None and not isinstance(value, list):
        name = place.rpartition(": ")[2].replace("[0]", "")
        raise UserError(f"{place}: must be a list of tables, each started with two pairs of brackets, as [[{name}]]")
    return [_table(item, f"{place}[{index}]") for index, item in enumerate(value or [])]
