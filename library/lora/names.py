"""How the layers of a model are called in networks' files, and what their names tell."""

import re

from torch import nn

from library.models.family import Family
from library.models.views import AttachPoints

STARTS = (TEXT, UNET) = "lora_te", "lora_unet"

_CONV_3X3 = re.compile(
    r"lora_unet_((.*_)?(conv1|conv2|conv_in|conv_out|in_layers_2|out_layers_3|\d_conv|\d_op)|input_blocks_0_0|out_2)"
)
_CONV_1X1 = re.compile(r"lora_unet_.*_(conv_shortcut|skip_connection)")
_PROJECTION = re.compile(r"lora_unet_.*_attentions_\d+_proj_(in|out)")  # linear but in the first models


def named_modules(points: AttachPoints) -> dict[str, nn.Module]:
    """All modules that a network can be attached to, by their names in files."""
    several = len(points.text_encoders) > 1
    roots = [(f"{TEXT}{number}" if several else TEXT, root) for number, root in enumerate(points.text_encoders, 1)]
    return {
        f"{prefix}_{name}".replace(".", "_"): module
        for prefix, root in (*roots, (UNET, points.unet))
        for name, module in root.named_modules()
    }


def split_key(key: str) -> tuple[str, str]:
    """A key of a file -> the name of the layer it belongs to, and which part of its change it holds."""
    name, _, part = key.partition(".")
    return name, part


def part_title(name: str) -> str:
    """The part of a model that a layer belongs to, as in a sentence."""
    if name.startswith(UNET):
        return "U-Net"
    number = name.removeprefix(TEXT).partition("_")[0]
    return f"text encoder {number}" if number else "text encoder"


def usual_shape(name: str, shape: tuple[int, ...], base: type[Family] | None) -> tuple[int, ...]:
    """The shape of a layer's weight in the published models, whose elements are those of `shape` in the same order.

    Some kinds of networks hold what they do to a convolution as a matrix, (out, in x height x width).
    """
    if len(shape) != 2:
        return shape
    out, width = shape
    if _CONV_3X3.fullmatch(name) and width % 9 == 0:
        return (out, width // 9, 3, 3)
    if _CONV_1X1.fullmatch(name) or (_PROJECTION.fullmatch(name) and base is not None and base.name == "sd1"):
        return (out, width, 1, 1)
    return shape
