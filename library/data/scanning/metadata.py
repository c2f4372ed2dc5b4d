"""Metadata files of fine-tuning subsets: `{key: {"caption": ..., "tags": ..., "train_resolution": [w, h]}}`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from library.console import warn
from library.data.buckets import Size
from library.data.scanning.members import read_members
from library.data.scanning.reading import tidy
from library.errors import UserError, nearest, suggest

_NAMES = ("caption", "tags", "train_resolution")


class Entry(NamedTuple):
    """What a metadata file says of one image."""

    key: str
    caption: bytes | None
    """Caption and tags in UTF-8; None without either"""
    train_resolution: Size | None


def read_metadata(path: Path) -> Iterator[Entry]:
    """The entries of a metadata file. Raises UserError, naming the file and the line or the key.

    Names in entries that look misspelt are warned of, once each; others are other programs'.
    """
    known = set(_NAMES)
    for key, value in read_members(path):
        yield _entry(f"{path}: {key}", key, value)
        for name in value.keys() - known:
            known.add(name)
            if nearest(name, _NAMES):
                warn(f"{path}: {key}: {name} means nothing here and is not used{suggest(name, _NAMES)}")


def _entry(place: str, key: str, value: dict[str, Any]) -> Entry:
    texts = []
    for name in ("caption", "tags"):
        text = value.get(name) or ""
        if not isinstance(text, str):
            raise UserError(f"{place}: {name} must be text, not {json.dumps(text)[:50]}")
        texts.append(text.strip())
    caption, tags = texts
    if caption and tags:
        caption = "\n".join(f"{line}, {tags}" for line in caption.splitlines())
    resolution = value.get("train_resolution")
    if resolution is not None and not _is_size(resolution):
        raise UserError(f"{place}: train_resolution must be [width, height], not {json.dumps(resolution)[:50]}")
    return Entry(key, tidy(caption or tags) if caption or tags else None, resolution and tuple(resolution))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**16 for n in value)
