"""What networks see of a model: trees with the names that their files use, whose leaves are the model's own modules.

Networks choose modules by class and name, and some stop at a class they do not expect. So the inner nodes of a view
have no class of their own, but for those that others look for.
"""

import re
from functools import cache
from typing import NamedTuple

from torch import nn

from library.models.sgm_keys import KeyMap


class AttachPoints(NamedTuple):
    """What networks are attached to."""

    text_encoders: list[nn.Module]
    unet: nn.Module

    @property
    def text_encoder(self) -> nn.Module | list[nn.Module]:
        """The text encoder, or the list where there are several, as network modules expect it."""
        return self.text_encoders[0] if len(self.text_encoders) == 1 else self.text_encoders


# Modules whose class other programs look for; a view keeps them whole and dissolves everything above them.
_KNOWN_CLASSES = {
    "Transformer2DModel",
    "ResnetBlock2D",
    "Downsample2D",
    "Upsample2D",
    "CLIPAttention",
    "CLIPMLP",
}


def neutral_view(module: nn.Module) -> nn.Module:
    """A tree with the same names and the same leaf modules, whose inner nodes have no class of their own."""
    children = list(module.named_children())
    if not children or type(module).__name__ in _KNOWN_CLASSES:
        return module
    view = nn.Module()
    for name, child in children:
        view.add_module(name, neutral_view(child))
    return view


def text_view(model: nn.Module) -> nn.Module:
    """A text encoder with the canonical level `text_model`, which transformers 5 took from some of its classes."""
    if any(name == "text_model" for name, _ in model.named_children()):
        return neutral_view(model)
    view = nn.Module()
    view.add_module("text_model", neutral_view(model))
    return view


@cache
def _node_class(name: str) -> type[nn.Module]:
    """A class of this name for a node that only groups others."""
    return type(name, (nn.Module,), {})


# Where a residual block or a sampling layer stands in the original layout.
_ORIGINAL_BLOCK = re.compile(r"(?:(?:in|out)put_blocks\.\d+|middle_block)\.\d+")


def original_view(unet: nn.Module, names: KeyMap) -> nn.Module:
    """The U-Net's modules under their names in an original file, as networks for SDXL want them."""
    view = nn.Module()
    modules = dict(unet.named_modules())
    for original, ours in names.pairs:
        if ours not in modules:  # not every residual block has a convolution beside it
            continue
        node = view
        *path, last = original.split(".")
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(last, neutral_view(modules[ours]))
        block = _ORIGINAL_BLOCK.match(original)
        kind = type(modules[ours.rpartition(".")[0]]).__name__
        if block and kind in _KNOWN_CLASSES:
            view.get_submodule(block[0]).__class__ = _node_class(kind)
    return view
