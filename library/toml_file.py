"""Files that users write by hand, TOML and JSON: one way to read them, one sentence for what is wrong with them."""

import json
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from library.errors import UserError, suggest_path


def read_text(path: Path, what: str, suffixes: Collection[str]) -> str:
    """The text of a file, which is a `what` ("config file"). UserError if there is none, naming a similar file with one
    of `suffixes`, and if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editor puts a mark at the start
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {what}{suggest_path(path, suffixes)}") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this {what} is not UTF-8 text, save it as UTF-8") from None
    except OSError as problem:
        raise UserError(f"{path}: this {what} cannot be read ({problem.strerror})") from None


def read_toml(path: Path, what: str, suffixes: Collection[str] = (".toml",)) -> dict[str, Any]:
    """The content of a TOML file, which is a `what` ("config file"). UserError if it cannot be read or is no TOML.

    A missing file is answered with a similar one that has one of `suffixes`.
    """
    try:
        return tomllib.loads(read_text(path, what, suffixes))
    except tomllib.TOMLDecodeError as problem:
        reason, _, place = str(problem).partition(" (at ")
        line = re.match(r"line \d+", place)  # or it says "end of document"
        hint = "; write paths with backslashes in 'single' quotes" if "escape" in reason.lower() else ""
        where = f"{path}, {line[0]}" if line else path
        raise UserError(f"{where}: this {what} is not valid TOML ({reason}){hint}") from None


def read_json(path: Path, what: str, suffixes: Collection[str] = (".json",)) -> Any:
    """The content of a JSON file, as `read_toml` reads TOML."""
    text = read_text(path, what, suffixes)
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise UserError(f"{path}, line {problem.lineno}: this {what} is not valid JSON ({problem.msg})") from None
