"""Models in several files of tensors beside an index (`*.safetensors.index.json`) that says what is where."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, some
from library.models.files.weights_file import WeightsFile

INDEX_SUFFIX = ".index.json"


class ShardedFile(WeightsFile):
    """The files of an index as one, each opened by `open_shard`.

    UserError if the index or a file is missing or damaged, or a tensor is not where the index says.
    """

    def __init__(self, path: Path, open_shard: Callable[[Path], WeightsFile]):
        self.path = path
        self.metadata = {}
        places = _read_index(path)
        with ExitStack() as opened:
            shards = {name: opened.enter_context(_open(path, name, open_shard)) for name in sorted({*places.values()})}
            for name, shard in shards.items():
                wanted = [key for key, place in places.items() if place == name]
                if missing := sorted({*wanted} - {*shard.keys()}):
                    raise UserError(
                        f"{shard.path} lacks tensors that {path.name} says it holds ({some(missing)}): "
                        "copy both files again, from one and the same model"
                    )
            self._shards = {key: shards[name] for key, name in places.items()}
            self._opened = opened.pop_all()

    def keys(self) -> list[str]:
        return list(self._shards)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shards[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._shards[key].dtype(key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._shards[key].get(key, dtype)

    def verify(self) -> None:
        for shard in {id(shard): shard for shard in self._shards.values()}.values():
            shard.verify()

    def close(self) -> None:
        self._opened.close()


def _read_index(path: Path) -> dict[str, str]:
    """The file names of an index by the tensors' names."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no index of a model in several files, or is damaged: copy it again") from error
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path} is damaged: its weight_map names no files, copy it again")
    # a name with folders in it could point anywhere on the disk
    if elsewhere := sorted(name for name in {*places.values()} if Path(name).name in {"", ".."} or {*name} & {*"/\\"}):
        raise UserError(f"{path} names files that are not beside it ({some(elsewhere)}): copy it again")
    return places


def _open(index: Path, name: str, open_shard: Callable[[Path], WeightsFile]) -> WeightsFile:
    shard = index.with_name(name)
    if not shard.exists():
        raise UserError(f"{shard} does not exist, but {index.name} names it: download all files of the model")
    return open_shard(shard)
