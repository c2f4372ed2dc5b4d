"""Where the name of a detector leads: to a file here, or to one in a repository of the hub. Imports nothing heavy."""

from collections.abc import Collection
from pathlib import Path

from library.errors import UserError, nearest, some, suggest_path
from library.hub import PATIENCE, from_hub, looks_like_hub_id, repository_files

_FLAG = "--model"
_SUFFIX = ".onnx"


def find_detector(name: str) -> Path:
    """The file that --model names. What is no file here but `owner/name/path.onnx`, or `owner/name` of a repository
    with one such file, is downloaded or found in the hub's cache. UserError if there is no such thing.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{_FLAG}: {path} is a folder, give the {_SUFFIX} file in it")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}"
    is_file = file.endswith(_SUFFIX) or (not file and not name.endswith((_SUFFIX, "/")))
    if looks_like_hub_id(repository) and is_file and not Path(owner).is_dir():
        return from_hub(_FLAG, name, lambda: _download(repository, file), lambda: _cached(repository, file))
    raise UserError(f"{_FLAG}: {path} does not exist{suggest_path(path, (_SUFFIX,))}")


def _download(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    names, _ = repository_files(repository)
    return Path(hf_hub_download(repository, _file(repository, file, names), etag_timeout=PATIENCE))


def _cached(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if file:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    folder = Path(snapshot_download(repository, local_files_only=True))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{_SUFFIX}")]
    return folder / _file(repository, file, names)


def _file(repository: str, file: str, names: Collection[str]) -> str:
    """The wanted file of a repository with files of these names, or the only one if none is named."""
    models = sorted(name for name in names if name.endswith(_SUFFIX))
    if file in models or (not file and len(models) == 1):
        return file or models[0]
    if not models:
        raise UserError(f"{_FLAG}: the repository {repository} has no {_SUFFIX} file")
    if not file:
        raise UserError(f"{_FLAG}: the repository {repository} has several models, add one of {some(models, 10)}")
    like = nearest(file, models)
    meant = f"did you mean {like}?" if like else f"it has {some(models, 10)}"
    raise UserError(f"{_FLAG}: the repository {repository} has no {file}, {meant}")
