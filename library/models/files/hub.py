"""Where a model's name leads: to a file, a folder, or a repository of the Hugging Face hub. Imports no torch."""

import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

from library.errors import UserError, some, suggest_path
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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATIENCE = 10  # seconds for the hub's first answer


def looks_like_hub_id(name: str) -> bool:
    """Whether it has the form `owner/name` of a repository, and does not name a file of weights."""
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(WEIGHTS_SUFFIXES)


def is_connection_error(error: BaseException) -> bool:
    """Whether it comes from the HTTP client of huggingface_hub, which is another one in every other version."""
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


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
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        names = [file.rfilename for file in HfApi().model_info(name, timeout=_PATIENCE).siblings or ()]
        patterns = wanted_files(names, variant, vae_alone=flag == "--vae")
        if not patterns:
            raise UserError(f"{flag}: the repository {name} {_what_it_holds(names, flag)}")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{flag}: the repository {name} is open only to those who have accepted its terms: accept them on its page "
            "and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{flag}: {name} is no file or folder here, and the hub has no such repository, or not for you: check the "
            "name, or log in with `hf auth login`"
        ) from error
    except OfflineModeIsEnabled:
        return _cached(name, flag, "the hub is switched off by HF_HUB_OFFLINE")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        return _cached(name, flag, f"the hub does not give it away at present ({status})")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{flag}: {name} cannot be downloaded, the disk of the hub's cache is full") from error
        return _cached(name, flag, "the hub cannot be reached")
    except Exception as error:
        if not is_connection_error(error):
            raise
        return _cached(name, flag, "the hub cannot be reached")


def _cached(name: str, flag: str, why: str) -> Path:
    """What the hub's cache has of a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{flag}: {name} is no file or folder here, {why}, and its cache has no copy of such a repository"
        ) from error


def _what_it_holds(names: Collection[str], flag: str) -> str:
    """The end of a sentence about a repository without what is read."""
    files = sorted(name for name in names if name.lower().endswith(WEIGHTS_SUFFIXES))
    files = [name for name in files if "/" not in name] or files
    what = "no autoencoder" if flag == "--vae" else f"no {INDEX}, so no model in Diffusers' layout"
    hint = f": download {some(files)} from it and give that file" if files else ""
    return f"has {what}{hint}"
