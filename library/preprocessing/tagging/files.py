"""Where a tagger's files are, and how they get there. Imports neither onnxruntime nor NumPy."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.console import notice
from library.errors import UserError, some
from library.hub import from_hub, looks_like_hub_id, repository_files
from library.tool_files import check_writable

MODEL, TAGS = FILES = ("model.onnx", "selected_tags.csv")


def find_tagger(model_dir: Path, repo_id: str, *, named: bool, download: bool = False) -> Path:
    """The folder with the files of a tagger: `model_dir` itself if they are there, unless a repository is `named` by
    the user; else the one below it that belongs to the repository, downloaded if it is not there yet or `download`.

    UserError if neither is to be had.
    """
    if not named and (model_dir / MODEL).exists():  # a list of tags alone may be that of a model in another format
        if download:
            raise UserError(f"--force_download: {model_dir} holds a {MODEL} that would still be used: drop the flag")
        if not (model_dir / TAGS).exists():
            raise UserError(f"--model_dir: {model_dir} holds {MODEL}, but no {TAGS}")
        return model_dir
    folder = model_dir / repo_id.replace("/", "_")
    if not download and all((folder / name).is_file() for name in FILES):
        return folder
    if not looks_like_hub_id(repo_id):
        raise UserError(f"--repo_id: {repo_id} is not written as owner/name; for a local folder give --model_dir")
    check_writable("--model_dir", folder)
    _download(repo_id, folder)
    return folder


def _download(repo_id: str, folder: Path) -> None:
    """Put a tagger's files into a folder from the hub, or from the hub's cache; what a killed download has got is kept
    beside it, for the next one.
    """
    from huggingface_hub import hf_hub_download

    partial = folder.with_name(f"{folder.name}.download")

    def download() -> Path:
        names, commit = repository_files(repo_id)
        if missing := [name for name in FILES if name not in names]:
            raise UserError(f"--repo_id: the repository {repo_id} has no {some(missing, 2)}, so it is no tagger")
        notice(f"{repo_id} is downloaded to {folder}")
        with _writable(partial):
            for name in FILES:
                hf_hub_download(repo_id, name, revision=commit, local_dir=partial)
        return partial

    def cached() -> Path:
        sources = [hf_hub_download(repo_id, name, local_files_only=True) for name in FILES]
        with _writable(partial):
            partial.mkdir(parents=True, exist_ok=True)
            for name, source in zip(FILES, sources, strict=True):
                shutil.copyfile(source, partial / name)
        return partial

    remedy = f"give the folder that holds {' and '.join(FILES)} as --model_dir"
    from_hub("--repo_id", repo_id, download, cached, remedy)
    with _writable(folder):
        folder.mkdir(exist_ok=True)
        (folder / TAGS).unlink(missing_ok=True)  # whoever is killed now leaves no mixture of two taggers
        for name in FILES:
            os.replace(partial / name, folder / name)
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Errors of the disk as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"--model_dir: {folder} cannot be written: {os.strerror(error.errno)}") from error
        raise
