"""The folder of a captioning model: here, or from the Hugging Face hub. Imports no torch."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from library.errors import UserError, suggest_path
from library.hub import looks_like_hub_id, snapshot_from_hub

_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"[^/]*\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")


def find_captioner(flag: str, name: str) -> Path:
    """The folder of the model that `flag` names: a folder here, or a repository of the hub, of which all that is needed
    is downloaded, or found in the hub's cache. UserError if there is none, or it holds no model of transformers.
    """
    path = Path(name)
    if not path.exists():
        near = suggest_path(path, folder=True)
        if not looks_like_hub_id(name) or (path.parent.is_dir() and near):
            raise UserError(f"{flag}: {path} does not exist{near}")
        path = _download(flag, name)
    if path.is_file():
        raise UserError(f"{flag}: {path} is a file, give the folder of a model or the name of a repository of the hub")
    _check_folder(flag, path)
    return path


def wanted_files(names: Collection[str]) -> list[str]:
    """The files of a repository that are read: one kind of weights, and all that tells how to use them."""
    small = [name for name in names if "/" not in name and name.endswith(_SMALL)]
    for pattern in _WEIGHTS:
        if weights := [name for name in names if re.fullmatch(pattern, name)]:
            return sorted(small + weights)
    return sorted(small)


def _download(flag: str, name: str) -> Path:
    def wanted(names: Collection[str]) -> list[str]:
        if "config.json" not in names:
            raise UserError(f"{flag}: the repository {name} has no config.json, so it is no model of transformers")
        return wanted_files(names)

    return snapshot_from_hub(flag, name, wanted)


def _check_folder(flag: str, folder: Path) -> None:
    """UserError if something is missing that every captioning model has."""
    names = [entry.name for entry in folder.iterdir()]
    if "config.json" not in names:
        raise UserError(f"{flag}: the folder {folder} has no config.json, so it is no model of transformers")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{flag}: {folder / 'config.json'} does not say what kind of model it is of")
    if not any(re.fullmatch(pattern, name) for name in names for pattern in _WEIGHTS):
        raise UserError(f"{flag}: the folder {folder} has no weights, neither model.safetensors nor pytorch_model.bin")
    if not {"preprocessor_config.json", "processor_config.json"} & set(names):
        raise UserError(
            f"{flag}: the folder {folder} has neither processor_config.json nor preprocessor_config.json: it is "
            f"incomplete, or a model ({config['model_type']}) that does not read pictures"
        )
