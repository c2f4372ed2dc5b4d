"""Where a model's name leads: to a file, a folder, or a repository of the Hugging Face hub. Imports no torch."""

import os
from collections.abc import Collection
from pathlib import Path

from library.errors import UserError, some, suggest_path
from library.hub import looks_like_hub_id, snapshot_from_hub
from library.models.files.folder_files import (
    COMPONENTS,
    CONFIG,
    INDEX,
    ORIGINAL_LAYOUT,
    is_index,
    shard_pattern,
    weights_name,
)
from library.suffixes import WEIGHTS_SUFFIXES


def find_model(
    name: str | os.PathLike, flag: str = "--pretrained_model_name_or_path", variant: str | None = None
) -> Path:
    """The file or folder of a model that `flag` names. What is neither but `owner/name` is a repository of the hub, of
    which all that is needed is downloaded, or found in the hub's cache; weights of a `variant` before others.
    For `--vae` that is the autoencoder alone.

    UserError if there is no such thing, or the hub cannot be asked for it.
    """
    path = Path(name)
    if path.exists():
        return path
    text = os.fspath(name)
    near = suggest_path(path, WEIGHTS_SUFFIXES) or suggest_path(path, folder=True)
    # `owner/name` with a folder `owner` here, and in it something of nearly that name, is a mistyped path
    if looks_like_hub_id(text) and not (path.parent.is_dir() and near):
        return _download(text, flag, variant)
    raise UserError(f"{flag}: {path} does not exist{near}")


def wanted_files(names: Collection[str], variant: str | None = None, *, vae_alone: bool = False) -> list[str]:
    """Patterns (`*` is anything) of the files of a repository that are read. Empty if it holds no model in folders."""
    if vae_alone:
        folder = "vae/" if f"vae/{CONFIG}" in names else ""
        return _component_files("vae", folder, names, variant) if f"{folder}{CONFIG}" in names else []
    if INDEX not in names:
        return []
    patterns = [INDEX, ORIGINAL_LAYOUT, "scheduler/*.json"]
    patterns += [f"tokenizer{number}/*.{suffix}" for number in ("", "_2") for suffix in ("json", "txt")]
    for component in COMPONENTS:
        patterns += _component_files(component, f"{component}/", names, variant)
    return patterns


def _component_files(component: str, folder: str, names: Collection[str], variant: str | None) -> list[str]:
    own = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    weights = weights_name(component, own, variant)
    if weights is None:
        return [f"{folder}{CONFIG}"]
    shards = [f"{folder}{shard_pattern(weights)}"] if is_index(weights) else []
    return [f"{folder}{CONFIG}", f"{folder}{weights}", *shards]


def _download(name: str, flag: str, variant: str | None) -> Path:
    """The folder with a repository's files, in the hub's cache."""

    def wanted(names: Collection[str]) -> list[str]:
        patterns = wanted_files(names, variant, vae_alone=flag == "--vae")
        if not patterns:
            raise UserError(f"{flag}: the repository {name} {_what_it_holds(names, flag)}")
        return patterns

    return snapshot_from_hub(flag, name, wanted)


def _what_it_holds(names: Collection[str], flag: str) -> str:
    """The end of a sentence about a repository without what is read."""
    files = sorted(name for name in names if name.lower().endswith(WEIGHTS_SUFFIXES))
    files = [name for name in files if "/" not in name] or files
    what = "no autoencoder" if flag == "--vae" else f"no {INDEX}, so no model in Diffusers' layout"
    hint = f": download {some(files)} from it and give that file" if files else ""
    return f"has {what}{hint}"
