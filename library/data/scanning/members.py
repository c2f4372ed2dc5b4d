"""Files that hold one JSON object, `{"<image>": {...}, ...}`, as the metadata of pictures does.

Read and written member by member, since a file of a million is several times larger as Python objects than on the disk.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from library.errors import UserError
from library.replacing import replacing

_PIECE = 2**20  # characters
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATES = re.compile("[\ud800-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False).encode
FORMAT = '{"<image>": {"caption": "..."}, ...}'


def read_members(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and objects in a metadata file, in its order. Raises UserError, naming the file and the line or key."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for key, value in _Members(path, file):
                if not isinstance(value, dict):
                    raise UserError(f"{path}: {key}: must be an object, as {FORMAT}")
                yield key, value
    except OSError as problem:
        raise UserError(f"{path}: this metadata file cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: this metadata file is not UTF-8: save it as UTF-8") from None


def write_members(path: Path, members: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Writes a metadata file that takes the place of `path` when it is whole; `path` may be read meanwhile.

    Raises UserError if it cannot be written.
    """
    with replacing(path) as file:
        start = "{"
        for key, value in members:
            fields = ",".join(f"\n    {_json(name)}: {_json(field)}" for name, field in value.items())
            file.write(f"{start}\n  {_json(key)}: {{{fields}\n  }}".encode())
            start = ","
        file.write(b"{}\n" if start == "{" else b"\n}\n")


def _json(value: Any) -> str:
    text = _encode(value)
    # a file's name may hold what no text can
    return text if text.isascii() or not _SURROGATES.search(text) else json.dumps(value)


def _finite(number: str) -> float:
    """The value of a number. ValueError for what JSON cannot hold, as NaN."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


class _Members:
    """Iterates over the members of the one JSON object in a file, and keeps only a piece of its text."""

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self.file = file
        self.text = ""
        self.position = 0
        self.lines = 0
        self.decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).raw_decode

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._next() != "}":
            yield from self._all()
        self._expect("}")
        if self._next():
            raise self._problem("nothing is expected after the last }", self.position)

    def _all(self) -> Iterator[tuple[str, Any]]:
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
            except RecursionError:
                raise self._problem("too many brackets in one another", self.position) from None
            except ValueError:
                raise self._problem("it has a number that is too large, or none", self.position) from None
            if end < len(self.text) or not self._more():  # a number may go on in the next piece
                self.position = end
                return value

    def _problem(self, what: str, position: int) -> UserError:
        line = self.lines + self.text.count("\n", 0, position) + 1
        return UserError(f"{self.path}: line {line}: no valid JSON ({what}): it should look like {FORMAT}")
