"""The `train_resolution` of pictures in metadata files."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from library.console import notice, warn
from library.data.buckets import Size
from library.data.scanning.members import write_members
from library.data.scanning.wording import counted
from library.errors import UserError, some
from library.preprocessing.metadata.file import MetadataFile, check_input, check_output, warn_of_losses
from library.preprocessing.metadata.keys import Keys
from library.suffixes import WEIGHTS_SUFFIXES

_NAME = "train_resolution"


def check_metadata(in_json: Path, out_json: Path, keys: Keys) -> MetadataFile:
    """The metadata to read. UserError if it is missing or cannot be understood, or has entries, but none of these
    pictures, and if the file to write cannot be written. Says what is amiss otherwise.
    """
    check_input("in_json", in_json)
    if out_json.suffix.lower() in WEIGHTS_SUFFIXES:
        raise UserError(
            f"out_json: {out_json} is the name of a model: after the folder come the metadata file to read, the one to "
            "write, and the model"
        )
    check_output("out_json", out_json)
    known = MetadataFile(in_json)
    without = dict.fromkeys(keys.pictures)
    strangers: list[str] = []
    stale: list[str] = []
    for key, entry in known:
        if picture := keys.picture(key):
            without.pop(picture, None)
            continue
        strangers.append(key)
        if _NAME in entry and keys.has_folder_of(key):
            stale.append(key)
    if len(strangers) == len(known) > 0:
        raise UserError(f"in_json: {_of_others(in_json, strangers, keys)}")
    if without:
        get = counted(len(without), "picture has no entry and gets one", "pictures have no entry and get one")
        warn(f"{in_json}: {get} without caption and tags: {some([picture.name for picture in without])}")
    if stale:
        entries = counted(len(stale), "entry has", "entries have")
        notice(f"{in_json}: {entries} a {_NAME}, but no picture, and nothing changes there: {some(stale)}")
    warn_of_losses(out_json, known, but=lambda key: keys.row(key) is not None)
    return known


def _of_others(in_json: Path, strangers: list[str], keys: Keys) -> str:
    """Why none of the entries is of a picture."""
    paths = sum(os.path.isabs(key) for key in strangers)
    if paths and not keys.full_path:
        return f"{in_json} has pictures by their whole paths, as {strangers[0]}: add --full_path"
    if not paths and keys.full_path:
        return f"{in_json} has pictures by their names, as {strangers[0]}: drop --full_path"
    return (
        f"none of the entries of {in_json}, as {strangers[0]}, is of a picture in {keys.pictures[0].parent}: give the "
        "folder that they were made for"
    )


def write_resolutions(known: MetadataFile, out_json: Path, keys: Keys, sizes: Mapping[Path, Size]) -> tuple[int, int]:
    """Write `known` with the train_resolution (width, height) of each picture in `sizes`; returns how many entries have
    it from here, and how many have none.

    Entries of other pictures stay as they are. Pictures without an entry get one.
    """
    without = dict.fromkeys(sizes)
    written = lacking = 0

    def members() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal written, lacking
        for key, value in known:
            picture = keys.picture(key)
            size = sizes.get(picture) if picture else None
            if size:
                value[_NAME] = list(size)
                without.pop(picture, None)
                written += 1
            lacking += _NAME not in value
            yield key, value
        for picture in without:
            written += 1
            yield keys.new(picture), {_NAME: list(sizes[picture])}

    with closing(members()) as entries:
        write_members(out_json, entries)
    return written, lacking
