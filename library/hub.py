"""Asking the Hugging Face hub for files, and what can be wrong with that, each in one sentence. Imports no torch."""

import errno
import re
from collections.abc import Callable, Collection
from pathlib import Path

from library.errors import UserError
from library.suffixes import WEIGHTS_SUFFIXES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
PATIENCE = 10  # seconds for the hub's first answer


def looks_like_hub_id(name: str) -> bool:
    """Whether it has the form `owner/name` of a repository, and does not name a file of weights."""
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(WEIGHTS_SUFFIXES)


def is_connection_error(error: BaseException) -> bool:
    """Whether it comes from the HTTP client of huggingface_hub, which is another one in every other version."""
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def repository_files(name: str) -> tuple[list[str], str]:
    """The files of a repository of the hub, and the commit that has them."""
    from huggingface_hub import HfApi

    known = HfApi().model_info(name, timeout=PATIENCE)
    return [file.rfilename for file in known.siblings or ()], known.sha


def snapshot_from_hub(flag: str, name: str, wanted: Callable[[Collection[str]], Collection[str]]) -> Path:
    """The folder in the hub's cache with those files of the repository which `flag` names that are `wanted` of all, as
    names or patterns: downloaded, or what there is of them if the hub cannot be reached. UserError if there is nothing.
    """
    from huggingface_hub import snapshot_download

    def download() -> Path:
        names, _ = repository_files(name)
        return Path(snapshot_download(name, allow_patterns=list(wanted(names))))

    return from_hub(flag, name, download, lambda: Path(snapshot_download(name, local_files_only=True)))


def from_hub(
    flag: str,
    name: str,
    download: Callable[[], Path],
    cached: Callable[[], Path],
    remedy: str = "give one that is on this machine",
) -> Path:
    """What `download` makes of the repository that `flag` names; what `cached` finds on this machine if the hub cannot
    be reached. Both call huggingface_hub. UserError if neither has it, with what to do then.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    def without_hub(why: str) -> Path:
        try:
            return cached()
        except LocalEntryNotFoundError as error:
            if part := getattr(error, "snapshot_path", None):  # all of it that was ever asked for, as far as one knows
                return Path(part)
            raise UserError(
                f"{flag}: {name} is no file or folder here, {why}, and its cache has no copy of such a repository: "
                f"{remedy}"
            ) from error

    try:
        return download()
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
        return without_hub("the hub is switched off by HF_HUB_OFFLINE")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        return without_hub(f"the hub does not give it away at present ({status})")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{flag}: {name} cannot be downloaded, the disk of the hub's cache is full") from error
        return without_hub("the hub cannot be reached")
    except Exception as error:
        if not is_connection_error(error):
            raise
        return without_hub("the hub cannot be reached")
