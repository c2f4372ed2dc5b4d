"""Arguments of classes that flags name, such as --optimizer_args: as Python literals, and checked before the call."""

import ast
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError, suggest

_WORDS = {"true": True, "false": False, "none": None}
_BASES = (Optimizer, LRScheduler, object)  # what is passed on to these are no arguments of the user's


def literal_keywords(
    kind: type,
    keywords: Mapping[str, str],
    flag: str = "--optimizer_args",
    own: Collection[str] = ("lr",),
    filled: Collection[str] = (),
) -> dict[str, Any]:
    """`keywords` as Python literals; text that is none stays text. The first argument of `kind`, and those in `own`,
    are not for the user to give; those that are `filled` in need not be given.

    UserError for a name that `kind` does not take, and for one that it needs and that is missing.
    """
    known, needed, takes_any = _arguments(kind, own)
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    for name in keywords:
        if name in own or (name not in known and not takes_any):
            raise UserError(f"{flag}: {kind.__name__} takes no {name}{suggest(name, known)} ({takes})")
    missing = [name for name in needed if name not in keywords and name not in filled]
    if missing:
        raise UserError(f"{flag}: {kind.__name__} needs {' and '.join(missing)} ({takes})")
    return {name: literal(text) for name, text in keywords.items()}


def literal(text: str) -> Any:
    """A Python literal, in which true, false and none may be written small; any other text as it is."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def takes(kind: type, name: str) -> bool:
    """Whether a class has an argument of this name."""
    known, _, _ = _arguments(kind, ())
    return name in known


def _arguments(kind: type, own: Collection[str]) -> tuple[list[str], list[str], bool]:
    """The names of a class's arguments, of those that it needs, and whether it takes any others.

    What a class passes on as **keywords are the arguments of the class that it inherits from.
    """
    known: dict[str, None] = {}
    needed: list[str] | None = None
    for place in kind.__mro__:
        if place in _BASES:
            break
        if "__init__" not in vars(place):
            continue
        parameters = list(inspect.signature(vars(place)["__init__"]).parameters.values())
        named = [one for one in parameters[2:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        named = [one for one in named if one.name not in own]
        known |= dict.fromkeys(one.name for one in named)
        if needed is None:
            needed = [one.name for one in named if one.default is one.empty]
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return list(known), needed, False
    return list(known), needed or [], True
