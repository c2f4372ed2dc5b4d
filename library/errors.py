"""Mistakes of the user: said in one sentence, never as a traceback."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. Its text is one sentence: what is wrong, where, and what to do instead."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None when nothing is close enough to be worth proposing."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: ", did you mean X?", or nothing."""
    match = nearest(name, choices)
    return f", did you mean {match}?" if match else ""


def suggest_path(path: Path) -> str:
    """The end of a sentence about a path that does not exist: what lies beside it under a similar name, or nothing."""
    if not path.parent.is_dir():
        return f", and neither is there a folder {path.parent}"
    match = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return f", did you mean {path.parent / match}?" if match else ""
