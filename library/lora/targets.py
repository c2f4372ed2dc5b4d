"""Where the weights that networks change lie in a model's file."""

from typing import NamedTuple

from library.lora.names import named_modules
from library.models.family import Family


class Target(NamedTuple):
    """A layer's weight or bias, as it lies in an original file: the rows from `start` of the tensor `key`, as many as
    `shape`, the layer's own, says. Flattened from the second dimension on, both are the same but for `turned` ones,
    which are the transpose.
    """

    key: str
    shape: tuple[int, ...]
    start: int = 0
    turned: bool = False


class Layer(NamedTuple):
    """One layer of a model that a network may change."""

    weight: Target
    bias: Target | None


def find_layers(model: Family) -> dict[str, Layer]:
    """All layers with weights of a model, which may be an outline, by their names in networks' files."""
    targets: dict[int, Target] = {}  # by the parameter they are for
    for module, names in model.components().values():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for place in names.places(parameters):
            start = 0
            for name in place.names:
                shape = tuple(parameters[name].shape)
                targets[id(parameters[name])] = Target(place.key, shape, start, place.turned)
                start += shape[0]
    layers = {}
    for name, module in named_modules(model.attach_points()).items():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and id(weight) in targets:
            layers[name] = Layer(targets[id(weight)], None if bias is None else targets[id(bias)])
    return layers
