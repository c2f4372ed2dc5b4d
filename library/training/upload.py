"""What is saved goes to the hub, too; what goes wrong on the way there never ends a run. Imports no torch."""

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from library import console
from library.errors import some
from library.options.huggingface import HubOptions
from library.training.hub import why_not

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class _Parcel:
    """A file or folder on its way: the files it had when it was handed over, with their places in the repository."""

    path: Path
    files: dict[str, Path]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is still there."""
        return all(file.exists() for file in self.files.values())


class Uploader:
    """Puts a copy of each save under --huggingface_path_in_repo, as one commit, so that a download never finds half of
    it. The repository is made when first needed. Only the first process uploads.

    What could not be uploaded is said, and tried again after the next save that could, as long as it is there.
    """

    def __init__(self, options: HubOptions, processes: int = 1):
        self.options = options
        self.is_asynchronous = options.async_upload or processes > 1  # the others must not wait for the first one
        self.is_active = options.uploads and console.rank() == 0
        self._missed: dict[Path, _Parcel] = {}
        self._queue: SimpleQueue[_Parcel | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def upload(self, path: Path) -> None:
        """Upload a model's file or folder: now, or with --async_upload or several processes while the run goes on."""
        if not self.is_active:
            return
        try:
            parcel = _pack(path, self.options.folder)
        except OSError as error:
            console.warn(f"{path} was not uploaded: {why_not(error, self.options.token)}")
            return
        if not self.is_asynchronous:
            self._deliver(parcel)
            return
        if self._thread is None:
            # a daemon: a program that is told to stop at once does not wait for the hub
            self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
            self._thread.start()
        self._queue.put(parcel)

    def upload_state(self, folder: Path) -> None:
        """The same of a state, if those are to be uploaded."""
        if self.options.save_state_to_huggingface:
            self.upload(folder)

    def finish(self) -> None:
        """Wait for what is on its way, and name what did not arrive. Called at the end of a run."""
        if self._thread is not None:
            console.notice(f"waiting for uploads to {self.options.huggingface_repo_id}")
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        for parcel in reversed(list(self._missed.values())):  # the final model before all others
            if not self._send(parcel):
                break
        if self._missed:
            names = [str(path) for path in self._missed]
            console.warn(f"not uploaded to {self.options.huggingface_repo_id}: {some(names)}")

    def _work(self) -> None:
        """What the thread does. After a failure what waits is put off: the library asks a hub that is down again and
        again, and would do so for each of it.
        """
        at_end = False
        while not at_end:
            waiting = [self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get())
            at_end = waiting[-1] is None
            works = True
            for parcel in filter(None, waiting):
                self._missed[parcel.path] = parcel
                works = works and self._deliver(parcel)

    def _deliver(self, parcel: _Parcel) -> bool:
        """Send it, and if that works, what did not work before. Whether it arrived."""
        arrived = self._send(parcel)
        for missed in list(self._missed.values()) if arrived else ():
            if not self._send(missed):  # which puts it behind the others
                break
        return arrived

    def _send(self, parcel: _Parcel) -> bool:
        """Whether it arrived. The files are read here, which takes long, and as they are now."""
        from huggingface_hub import CommitOperationAdd

        path, repo_id = parcel.path, self.options.huggingface_repo_id
        self._missed.pop(path, None)
        try:
            self._api.create_commit(
                repo_id,
                [CommitOperationAdd(place, str(file)) for place, file in parcel.files.items()],
                commit_message=f"Upload {path.name}",
                repo_type=self.options.repo_type,
            )
        except Exception as error:  # whatever it is, training is worth more
            if parcel.is_whole:
                self._missed[path] = parcel
                reason = why_not(error, self.options.token)
                console.warn(f"{path} was not uploaded to {repo_id}: {reason}; it is tried again after the next save")
            else:
                console.warn(f"{path} was removed before it was uploaded to {repo_id}")
            return False
        console.notice(f"uploaded {path.name} to {repo_id}")
        return True

    @cached_property
    def _api(self) -> "HfApi":
        """The way to the repository, which exists from then on."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would tear that of training
        api = HfApi(token=self.options.token)
        kind = self.options.repo_type
        api.create_repo(
            self.options.huggingface_repo_id,
            private=not self.options.public,
            repo_type=kind,
            exist_ok=True,
            space_sdk="static" if kind == "space" else None,  # the hub insists on one; this one runs nothing
        )
        return api


def _pack(path: Path, folder: str) -> _Parcel:
    """A file, or all files below a folder, with their places in the repository. OSError if it cannot be listed."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    prefix = f"{folder}/" if folder else ""
    return _Parcel(path, {f"{prefix}{file.relative_to(path.parent).as_posix()}": file for file in files})
