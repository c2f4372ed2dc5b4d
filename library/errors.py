"""Mistakes of the user: said in one sentence, never as a traceback."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend. Its text is one sentence: what is wrong, where, and what to do instead."""


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice most like `name`, or None when nothing is close enough (0 to 1) to be worth proposing."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggest(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: ", did you mean X?", or nothing."""
    match = nearest(name, choices)
    return f", did you mean {match}?" if match else ""


def suggest_path(path: Path, suffixes: Collection[str] = (), *, folder: bool = False) -> str:
    """The end of a sentence about a file that does not exist: the one beside it with the most similar name, or nothing.

    Only files with one of `suffixes` (".toml", in small letters) are proposed, if there are any; only folders for a
    missing `folder`.
    """
    try:
        entries = [entry for entry in path.parent.iterdir() if entry.is_dir() == folder]
    except OSError:
        return f", nor is there a folder {path.parent}"
    if not suffixes:
        match = nearest(path.name, [entry.name for entry in entries])
        return f", did you mean {path.parent / match}?" if match else ""
    # endings that all of them have make no names alike
    entries = sorted((entry.suffix == path.suffix, entry) for entry in entries if entry.suffix.lower() in suffixes)
    by_stem = {entry.stem: entry for _, entry in entries}
    match = nearest(path.stem, by_stem, cutoff=0.5)
    return f", did you mean {by_stem[match]}?" if match else ""


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, for a sentence, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
