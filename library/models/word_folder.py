"""Several new words as a folder with a file for each, which other programs take as it is."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.models.diffusers_writer import check_replaceable
from library.models.files.checkpoint import write_tensors
from library.replacing import replacing, replacing_folder
from library.suffixes import WEIGHTS_SUFFIXES

WORDS = "words.json"  # word -> its file; without it, a folder is none of ours


@dataclass(frozen=True)
class WordFile:
    """What the file of a word holds: vectors (n, width) by their names, and what is told of them."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def write_words(folder: Path, files: Mapping[str, WordFile], dtype: torch.dtype | None) -> None:
    """Write a file for each word. They appear together, in the place of an older folder of words. UserError if the
    place cannot be written or is in use.
    """
    check_words_replaceable(folder)
    with replacing_folder(folder) as temporary:
        for file in files.values():
            write_tensors(temporary / file.name, file.tensors, dtype, file.metadata, content_hash=True)
        with replacing(temporary / WORDS) as index:
            names = {word: file.name for word, file in files.items()}
            index.write((json.dumps(names, indent=2, ensure_ascii=False) + "\n").encode())


def check_words_replaceable(folder: Path) -> None:
    """UserError if a folder of words must not be written here: see `check_replaceable`."""
    check_replaceable(folder, others=_others, kind="words'")


def _others(folder: Path, *, unfinished: bool = False) -> list[str]:
    """What lies in a folder and is none of ours. Of an `unfinished` one the last file can be half-written."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        if unfinished:
            whole = {name: re.sub(r"\.\d+\.tmp$", "", name) for name in names}
            return [name for name in names if whole[name] != WORDS and Path(whole[name]).suffix not in WEIGHTS_SUFFIXES]
        if WORDS not in names:
            return names
        own = {WORDS, *_named(folder / WORDS)}
        return [name for name in names if name not in own or not (folder / name).is_file()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def _named(index: Path) -> list[str]:
    """The files that are listed; none if it is no such list."""
    try:
        names = json.loads(index.read_bytes())
    except ValueError:
        return []
    return [name for name in names.values() if isinstance(name, str)] if isinstance(names, dict) else []
