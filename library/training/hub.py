"""The hub as a place for what a run makes: what can be wrong with its flags, and states that lie there. No torch."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

from library import console
from library.errors import UserError, nearest, suggest
from library.hub import is_connection_error, looks_like_hub_id
from library.options.huggingface import REPO_TYPES, HubOptions

_FORM = "owner/name/folder, owner/name/folder:revision or owner/name/folder:revision:type"


@dataclass(frozen=True)
class StateAddress:
    """Where on the hub a state lies."""

    repo_id: str
    folder: str
    revision: str | None
    repo_type: str


def check_hub(options: HubOptions, resume: str | None, saves_states: bool) -> None:
    """UserError for the first mistake in the flags for the hub, given --resume and whether states are saved at all."""
    if options.resume_from_huggingface:
        if not resume:
            raise UserError(f"--resume_from_huggingface: name the state with --resume {_FORM}")
        parse_address(resume)
    if options.uploads:
        _check_uploads(options, saves_states)
    else:
        _check_no_uploads(options)


def _check_uploads(options: HubOptions, saves_states: bool) -> None:
    repo_id, visibility = options.huggingface_repo_id, options.huggingface_repo_visibility
    if not looks_like_hub_id(repo_id):
        raise UserError(f"--huggingface_repo_id: {repo_id} is not the name of a repository, which is owner/name")
    if visibility and visibility not in ("public", "private"):
        console.warn(
            f"--huggingface_repo_visibility: {visibility} is neither public nor private, so a new repository is private"
        )
    if options.save_state_to_huggingface and not saves_states:
        console.warn("--save_state_to_huggingface has no effect: no states are saved, add --save_state")
    with console.quiet_dependencies():
        from huggingface_hub import get_token
    if not (options.token or get_token()):
        raise UserError(
            f"--huggingface_repo_id: nothing can be uploaded to {repo_id} without an access token, log in with "
            "`hf auth login` or set HF_TOKEN"
        )


def _check_no_uploads(options: HubOptions) -> None:
    if options.save_state_to_huggingface:
        raise UserError("--save_state_to_huggingface: no repository is named, add --huggingface_repo_id owner/name")
    names = ["huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"]
    for name in names:
        if getattr(options, name):
            console.notice(f"--{name} has no effect: nothing is uploaded without --huggingface_repo_id")


def parse_address(text: str) -> StateAddress:
    """`owner/name/folder:revision:type`, of which the last two may be left out. UserError if it is anything else."""
    path, *details = text.split(":")
    owner, _, rest = path.partition("/")
    name, _, folder = rest.partition("/")
    folder, repo_id = folder.strip("/"), f"{owner}/{name}"
    if not looks_like_hub_id(repo_id) or not folder or len(details) > 2:
        raise UserError(f"--resume: {text} is no state of the hub, which is written as {_FORM}")
    revision, repo_type = [*details, "", ""][:2]
    if repo_type and repo_type not in REPO_TYPES:
        raise UserError(
            f"--resume: {repo_type} in {text} is no type of repository, choose {', '.join(REPO_TYPES)}"
            f"{suggest(repo_type, REPO_TYPES)}"
        )
    return StateAddress(repo_id, folder, revision or None, repo_type or "model")


def download_state(name: str, options: HubOptions, cache: Path | None = None) -> Path:
    """The local copy of a state's folder that `name` (see `parse_address`) describes, below `cache`, by default that of
    the hub's library. What is there already is not fetched again; of the repository nothing else is.

    UserError if there is no such state, or the hub does not give it away.
    """
    address = parse_address(name)
    try:
        return _download(address, options.token, cache)
    except UserError:
        raise
    except Exception as error:  # versions of huggingface_hub have different HTTP clients, each with errors of its own
        reason = why_not(error, options.token)
        raise UserError(f"--resume: {address.folder} of {address.repo_id} cannot be downloaded: {reason}") from error


def _download(address: StateAddress, token: str | None, cache: Path | None) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    api = HfApi(token=token)
    place = {"repo_id": address.repo_id, "repo_type": address.repo_type}
    try:
        # one commit for the list and for the files: a state that is uploaded meanwhile is not mixed with an old one
        commit = api.repo_info(revision=address.revision, **place).sha
        files = api.list_repo_files(revision=commit, **place)
    except RevisionNotFoundError as error:
        raise UserError(f"--resume: {address.repo_id} has no revision {address.revision}") from error
    if not any(file.startswith(f"{address.folder}/") for file in files):
        raise UserError(f"--resume: {address.repo_id} has no folder {address.folder}{_like(address.folder, files)}")
    pattern = f"{escape(address.folder)}/*"
    root = api.snapshot_download(revision=commit, allow_patterns=pattern, cache_dir=cache, **place)
    return Path(root) / address.folder


def _like(folder: str, files: Collection[str]) -> str:
    """The end of a sentence about a folder that is not there."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
    match = nearest(folder, sorted(folders))
    return f", did you mean {match}?" if match else ""


def why_not(error: BaseException, token: str | None) -> str:
    """Why the hub did not do what it was asked for, in a few words without the token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:  # of a single file
        return why_not(error.__cause__, token)
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off by HF_HUB_OFFLINE"
    if isinstance(error, GatedRepoError):
        return "it is open only to those who have accepted its terms, on its page"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the access token does not open it"
    if status == 401:
        return "the hub does not accept the access token"
    if status == 403:
        return "the access token does not allow it"
    if is_connection_error(error):
        return "the hub cannot be reached"
    if isinstance(error, HfHubHTTPError) and status is not None:
        said = getattr(error, "server_message", None)
        return without_secrets(f"the hub answers with an error ({status}{f': {said}' if said else ''})", token)
    return without_secrets(f"{type(error).__name__}: {error}", token)


def without_secrets(text: str, token: str | None) -> str:
    """One line of text in which no access token shows: neither this one nor that of this machine's login."""
    from huggingface_hub import get_token

    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "***")
    return re.sub(r"hf_\w+", "***", " ".join(text.split()))
