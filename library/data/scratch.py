"""Temporary folders that processes share and that disappear with the object, and process, that made them."""

import os
import shutil
import tempfile
import weakref
from pathlib import Path


class ScratchFolder:
    """A new temporary folder, deleted when this object is collected or its process ends."""

    def __init__(self, purpose: str):
        self.path = Path(tempfile.mkdtemp(prefix=f"atelier_{purpose}_"))
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked loader worker holds a copy of the object, and must leave the folder alone
        shutil.rmtree(folder, ignore_errors=True)
