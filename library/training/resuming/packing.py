"""Nested Python values as JSON and named tensors, and back: how the state of an optimizer is kept without pickle."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR, _PAIRS, _TUPLE, _NUMPY = "$tensor", "$pairs", "$tuple", "$numpy"


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """What JSON can hold of a value, with the tensors in it put into `tensors` under names that tell where they were.

    TypeError for what is neither a tensor, a number, a text, None, nor a list, tuple or dictionary of those.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, np.generic):  # some are also Python's numbers, but round in another way
        return {_NUMPY: [value.dtype.str, value.item()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{name}.{number}") for number, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        # as pairs, because JSON knows only texts as keys
        return {_PAIRS: [[pack(key, tensors), pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    raise TypeError(f"{name} holds a {type(value).__name__}, which no state can keep")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that was packed."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _NUMPY:
        return np.dtype(content[0]).type(content[1])
    if kind == _TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    return {unpack(key, tensors): unpack(item, tensors) for key, item in content}


@torch.no_grad()
def put(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module's parameters and buffers the values that `raw` named. ValueError that says what does not fit."""
    own, buffers = raw(module), dict(module.named_buffers())
    check_shapes(module, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    for key, tensor in own.items():
        if key in buffers:
            check_constant(key, tensor, tensors[key])
        tensor.copy_(tensors[key])


def check_shapes(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError if tensors of these names and shapes cannot be `put` into a module."""
    own, buffers = raw(module), dict(module.named_buffers())
    missing, strange = own.keys() - shapes.keys(), shapes.keys() - own.keys() - buffers.keys()
    unfit = [key for key in own.keys() & shapes.keys() if tuple(own[key].shape) != shapes[key]]
    if missing or strange or unfit:
        name = min(missing or strange or unfit)
        what = "is missing" if missing else "is unknown" if strange else f"is {list(shapes[name])} there"
        raise ValueError(f"{name} {what}")


def check_constant(name: str, own: Tensor, theirs: Tensor) -> None:
    """ValueError for a buffer that is another alpha: networks compute with what they have made of it at first."""
    if name.endswith("alpha") and own.numel() == 1 and float(own) != float(theirs):
        raise ValueError(f"{name} is {float(theirs):g} there and {float(own):g} here")


def raw(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by name, as they are: modules may rewrite `state_dict`."""
    made_anew = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in named if name not in made_anew}
