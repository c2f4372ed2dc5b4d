"""The files that a tool reads and writes, looked at before anything is done. Imports no torch."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from library.errors import UserError, nearest, suggest_path
from library.replacing import clean_up
from library.suffixes import WEIGHTS_SUFFIXES


def check_inputs(flag: str, paths: Iterable[Path]) -> None:
    """UserError if one of the files that `flag` names is missing."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{flag}: {path} does not exist{suggest_path(path, WEIGHTS_SUFFIXES)}")


def check_output(flag: str, path: Path, inputs: Iterable[Path]) -> None:
    """UserError if what `flag` names cannot be a file of weights, would become a part of what is read, or cannot be
    written where it is to be. What killed processes left of a file of this name is removed.
    """
    check_apart(flag, path, inputs)
    if path.suffix.lower() not in WEIGHTS_SUFFIXES:
        meant = f", did you mean {like}?" if (like := _meant(path)) else ""
        raise UserError(f"{flag}: {path} ends in none of {', '.join(WEIGHTS_SUFFIXES)}{meant}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder, give the name of a file in it")
    check_writable(flag, path)
    if path.parent.is_dir():
        clean_up(path.parent, re.escape(path.name))


def check_apart(flag: str, target: Path, inputs: Iterable[Path], *, recursive: bool = False) -> None:
    """UserError if a target is one of the inputs, or would lie in a folder that is read; `recursive`: or if it holds
    one, where what is written to its folders may lie then.
    """
    for source in inputs:
        if target.exists() and source.exists() and target.samefile(source):
            what = "folders" if source.is_dir() else "files"
            raise UserError(f"{flag}: {target} is one of the {what} to read, choose another name")
        if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{flag}: {target} lies in {source}, which is read, choose another folder")
        if recursive and source.resolve().is_relative_to(target.resolve()):
            raise UserError(
                f"{flag}: {target} holds {source}, which is read: with --recursive, pictures there could be replaced, "
                "choose another folder"
            )


def check_writable(flag: str, target: Path) -> None:
    """UserError if the folder that is to hold a target takes no files."""
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is a file and can hold no {target.name}, choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {folder} cannot be written to, choose another folder or have its rights changed")


def check_ending(flag: str, target: Path) -> None:
    """UserError if a target would become a folder only because the ending of a file is mistyped."""
    like = _meant(target)
    if like and not target.is_dir():
        raise UserError(f"{flag}: {target} ends almost like a file and would be a folder, did you mean {like}?")


def _meant(target: Path) -> Path | None:
    """What it would be with the ending of a file of weights that its own is much like."""
    suffix = target.suffix.lower()
    like = nearest(suffix, WEIGHTS_SUFFIXES) if len(suffix) > 3 and suffix[1:].isalpha() else None
    return target.with_suffix(like) if like and like != suffix else None
