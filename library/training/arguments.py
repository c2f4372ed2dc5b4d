"""Arguments that a user writes for a class of somebody else's."""

import ast
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from library.errors import UserError, suggest


def read_arguments(
    kind: type, words: Mapping[str, str], flag: str, given: Collection[str] = (), filled: Collection[str] = ()
) -> dict[str, Any]:
    """What `flag` says for a class, read as Python literals; text that is none stays text.

    `given` are arguments that are not the user's to give, `filled` those that need not be. UserError for a name that
    the class does not take, and for one that it needs and does not get.
    """
    parameters = [one for one in inspect.signature(kind).parameters.values() if one.name not in given]
    named = {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    takes = f"(it takes {', '.join(named)})" if named else "(it takes none)"
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for name in words:
        if name in given or not (name in named or takes_any):
            raise UserError(f"{flag}: {kind.__name__} takes no {name}{suggest(name, named)} {takes}")
    needed = [name for name, one in named.items() if one.default is one.empty]
    missing = [name for name in needed if name not in words and name not in filled]
    if missing:
        raise UserError(f"{flag}: {kind.__name__} needs {' and '.join(missing)} {takes}")
    return {name: literal(text) for name, text in words.items()}


def literal(text: str) -> Any:
    """The Python literal that a text is, or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
