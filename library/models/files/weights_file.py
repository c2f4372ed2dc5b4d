"""What files of tensors have in common, whatever their format."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are made when they are asked for."""

    @abstractmethod
    def outlines(self) -> Mapping[str, Tensor]:
        """All of them on the meta device: number formats and shapes without data."""


class WeightsFile(AbstractContextManager["WeightsFile"]):
    """An open file of named tensors; a context manager. Nothing but the header is read until `get`."""

    path: Path
    metadata: dict[str, str]
    configs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # those of a Diffusers folder, by component

    @abstractmethod
    def keys(self) -> list[str]:
        """The tensors' names."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """The number format that the tensor is stored in."""

    @abstractmethod
    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, on the CPU; floating-point ones in `dtype` if given."""

    @abstractmethod
    def close(self) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All names with their shapes."""
        names = self.keys()
        return {key: self.shape(key) for key in names}

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, in memory."""
        names = self.keys()
        return {key: self.get(key) for key in names}

    def verify(self) -> None:
        """Compare the contents with the hash in the metadata or the archive's checksums, where the file has such; reads
        all of it. UserError if they differ.
        """

    def __exit__(self, *exception: object) -> None:
        self.close()


class HeldTensors(WeightsFile):
    """A file whose tensors are there as `_tensors` while it is open."""

    _tensors: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def close(self) -> None:
        self._tensors = {}


def outlines_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors to take number formats and shapes from; makes none of those that are made when they are asked for."""
    return tensors.outlines() if isinstance(tensors, LazyTensors) else tensors


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor, in `dtype` if that is given and it holds floating-point numbers."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def overflows(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether `cast` makes infinities of finite numbers."""
    if dtype is None or not tensor.is_floating_point() or not tensor.numel():
        return False
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return False
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # rounding keeps the order: they tell of all the others
    return bool((extremes.isfinite() & ~extremes.to(dtype).isfinite()).any())


def is_finite(tensor: Tensor) -> bool:
    """Whether all of its numbers are finite. For 8-bit floats torch has no test."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
        return True
    # not a number is both the smallest and the largest: much faster than a test of each
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def stored_dtype(outline: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The format that `cast` gives."""
    return dtype if dtype is not None and outline.is_floating_point() else outline.dtype


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def bytes_to_store(name: str, tensor: Tensor, outline: Tensor, dtype: torch.dtype | None) -> memoryview:
    """The tensor's bytes in a file, cast by `dtype`. It must be what `outline` says, or the file would be broken."""
    tensor = cast(tensor.detach(), dtype).cpu().contiguous()
    if tensor.shape != outline.shape or tensor.dtype != stored_dtype(outline, dtype):
        raise RuntimeError(f"{name} was announced as {outline.dtype} {list(outline.shape)} and is another tensor")
    return bytes_of(tensor)
