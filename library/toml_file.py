"""Files that users write by hand, above all TOML: one way to read them, one sentence for what is wrong with them."""

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


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file, which is a `what` ("config file"). UserError if it cannot be read or is no TOML."""
    text = read_text(path, what, [".toml"])
    import toml  # only who has such a file pays for it

    try:
        return toml.loads(text)
    except toml.TomlDecodeError as problem:
        hint = "; write paths with backslashes in 'single' quotes" if "escape" in problem.msg.lower() else ""
        raise UserError(f"{path}, line {problem.lineno}: this {what} is not valid TOML ({problem.msg}){hint}") from None
    except (IndexError, TypeError, ValueError):  # slips of the package on some malformed files
        raise UserError(f"{path}: this {what} is not valid TOML") from None
