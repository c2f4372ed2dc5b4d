"""Files of tensors put together from parts of others, under other names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.files.checkpoint import WeightsFile


class Selection(WeightsFile):
    """Tensors of open files as if they were those of one at `path`; closing it closes all of `files`.

    `entries`: a tensor's name here -> (its file, its name there). `configs`, by component, come with them.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[WeightsFile, str]],
        files: Iterable[WeightsFile],
        metadata: Mapping[str, str],
        configs: Mapping[str, Mapping[str, Any]],
    ):
        self.path = path
        self.metadata = dict(metadata)
        self.configs = configs
        self._entries = dict(entries)
        self._files = list(files)

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        file, name = self._entries[key]
        return file.shape(name)

    def dtype(self, key: str) -> torch.dtype:
        file, name = self._entries[key]
        return file.dtype(name)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        file, name = self._entries[key]
        return file.get(name, dtype)

    def verify(self) -> None:
        for file in self._files:
            file.verify()

    def close(self) -> None:
        for file in self._files:
            file.close()


def part_of(file: WeightsFile, start: str) -> Selection:
    """The tensors of a file whose names begin with `start`."""
    entries = {key: (file, key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118 - no mapping
    return Selection(file.path, entries, [file], file.metadata, file.configs)


def renamed(file: WeightsFile, names: Mapping[str, str]) -> Selection:
    """Tensors of a file under other names: `names` are new -> old; what is not among them is left out."""
    return Selection(file.path, {new: (file, old) for new, old in names.items()}, [file], file.metadata, file.configs)
