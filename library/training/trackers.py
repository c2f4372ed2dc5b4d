"""What the trackers of a run are started with. Imports no torch: mistakes are found before."""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from library.errors import UserError, suggest
from library.hub import looks_like_hub_id
from library.options.base import Settings
from library.options.logging import TRACKERS, LogOptions
from library.toml_file import read_toml


def tracker_names(options: LogOptions) -> list[str]:
    """What is logged with, by accelerate's names."""
    return list(options.trackers)


def check_trackers(options: LogOptions) -> None:
    """UserError if a tracker that is asked for is not installed, or --log_tracker_config is wrong."""
    if "wandb" in options.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--log_with: Weights & Biases is not installed for this Python: run {sys.executable} -m pip install wandb"
        )
    read_tracker_config(options)


def read_tracker_config(options: LogOptions) -> dict[str, dict[str, Any]]:
    """The tables of --log_tracker_config by tracker. UserError for one that no tracker has."""
    if not options.log_tracker_config:
        return {}
    path = Path(options.log_tracker_config)
    tables = read_toml(path, "tracker configuration")
    for name, table in tables.items():
        if name not in TRACKERS:
            raise UserError(f"{path}: {name} is no tracker, use [tensorboard] or [wandb]{suggest(name, TRACKERS)}")
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} is to be a table, write [{name}] and its settings below")
    return tables


def wandb_arguments(options: LogOptions, wanted: Mapping[str, Any], folder: Path | None, run_id: str) -> dict[str, Any]:
    """What wandb.init is called with: our defaults under what --log_tracker_config wants."""
    ours: dict[str, Any] = {"id": run_id, "resume": "allow"}
    if folder is not None:
        ours["dir"] = str(folder)
    if options.wandb_run_name:
        ours["name"] = options.wandb_run_name
    settings = {
        "console": "off",  # what is shown names private folders
        "silent": True,
        "x_disable_machine_info": True,  # it has the command line in it, keys included
    }
    return ours | dict(wanted) | {"settings": settings | dict(wanted.get("settings", {}))}


def public_config(settings: Settings) -> dict[str, Any]:
    """The settings as others may see them: without secrets, and of paths the last part only."""
    config = {name: public_value(value) for name, value in settings.flat().items()}
    model = settings.flat().get("pretrained_model_name_or_path")
    if model and looks_like_hub_id(model) and not os.path.exists(model):
        config["pretrained_model_name_or_path"] = model
    return config


def public_value(value: Any) -> Any:
    """A setting as others may see it, in what JSON has: of each path in it the last part."""
    if isinstance(value, tuple):
        return " ".join(str(public_value(one)) for one in value)
    if isinstance(value, Path):
        return _last_part(str(value))
    if not isinstance(value, str):
        return value
    if PureWindowsPath(value).is_absolute() or value.startswith(("/", "~", "..")) or os.path.exists(value):
        return _last_part(value)  # as a whole: names of folders may have commas
    name, equals, rest = value.partition("=")
    if equals:
        return f"{public_value(name)}={public_value(rest)}"
    return re.sub(r"[^,;]*[/\\][^,;]*", lambda path: _last_part(path[0]), value)


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name
