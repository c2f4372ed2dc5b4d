"""The file of a network."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from library.errors import UserError, some
from library.models.files.checkpoint import open_weights, stores_metadata, write_tensors
from library.models.metadata import network_hashes
from library.training.methods.network_module import called, failure


def write_network(
    network: nn.Module, name: str | None, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]
) -> Path:
    """Write a network of the module `name` and return the path, at which the file appears when it is whole. UserError
    if it cannot be written, or if what the network puts there is not finite.
    """
    tensors = _as_it_writes_them(network, name, path, dtype)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{failure(name, 'save_weights')}: what it writes as {str(dtype).removeprefix('torch.')} is not finite "
            f"({len(broken)} of {len(tensors)} tensors: {some(broken)}), so no file is written: "
            + ("use --save_precision float or bf16" if dtype == torch.float16 else "lower the learning rate")
        )
    if stores_metadata(path):
        metadata = {**metadata, **network_hashes(tensors, None, metadata)}
    write_tensors(path, tensors, None, metadata)
    return path


def _as_it_writes_them(network: nn.Module, name: str | None, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Written aside, for what a network puts into its file is its own affair; ours is hashed and whole."""
    # named as all that is unfinished; a name of its own inside, with the ending by which the network knows a format
    folder = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft = folder / f"network{path.suffix}"
    try:
        with called(name, "save_weights"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                network.save_weights(str(draft), dtype, None)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be written: {error}") from error
            if not draft.is_file():
                raise UserError(f"{failure(name, 'save_weights')}: it writes no file")
            with open_weights(draft) as file:
                return file.tensors()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
