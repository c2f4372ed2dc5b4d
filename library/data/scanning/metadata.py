"""Metadata files of fine-tuning subsets: `{key: {"caption": ..., "tags": ..., "train_resolution": [w, h]}}`.

Read entry by entry, since a file of a million is several times larger as Python objects than on the disk.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from library.console import warn
from library.data.buckets import Size
from library.data.scanning.reading import tidy
from library.errors import UserError, nearest, suggest

_PIECE = 2**20  # characters
_BLANKS = re.compile(r"[ \t\r\n]*")
_NAMES = ("caption", "tags", "train_resolution")
_FORMAT = '{"<image>": {"caption": "..."}, ...}'


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
    try:
        with path.open(encoding="utf-8-sig") as file:
            for key, value in _Members(path, file):
                yield _entry(f"{path}: {key}", key, value)
                for name in value.keys() - known:
                    known.add(name)
                    if nearest(name, _NAMES):
                        warn(f"{path}: {key}: {name} means nothing here and is not used{suggest(name, _NAMES)}")
    except OSError as problem:
        raise UserError(f"{path}: this metadata file cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: this metadata file is not UTF-8: save it as UTF-8") from None


def _entry(place: str, key: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise UserError(f"{place}: must be an object, as {_FORMAT}")
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


class _Members:
    """Iterates over the members of the one JSON object in a file, and keeps only a piece of its text."""

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self.file = file
        self.text = ""
        self.position = 0
        self.lines = 0
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._next() == "}":
            return
        while True:
            if self._next() != '"':
                raise self._problem("a name in quotes is expected here", self.position)
            key = self._value()
            self._expect(":")
            self._next()
            yield key, self._value()
            if self._next() == "}":
                return
            self._expect(",")

    def _more(self) -> bool:
        """Drops the text that has been read, and adds at least as much as is left."""
        self.lines += self.text.count("\n", 0, self.position)
        rest = self.text[self.position :]
        piece = self.file.read(max(_PIECE, len(rest)))
        self.text, self.position = rest + piece, 0
        return bool(piece)

    def _next(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            self.position = _BLANKS.match(self.text, self.position).end()
            if self.position < len(self.text) or not self._more():
                return self.text[self.position : self.position + 1]

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise self._problem(f"{character} is expected here", self.position)
        self.position += 1

    def _value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as problem:
                if not self._more():
                    raise self._problem(problem.msg, problem.pos) from None
                continue
            if end < len(self.text) or not self._more():  # a number may go on in the next piece
                self.position = end
                return value

    def _problem(self, what: str, position: int) -> UserError:
        line = self.lines + self.text.count("\n", 0, position) + 1
        return UserError(f"{self.path}: line {line}: no valid JSON ({what}): it should look like {_FORMAT}")
