"""How programs spell the keys of networks' files: our own names, those of Diffusers, and those of peft."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from library.lora.names import STARTS, TEXT, UNET, split_key
from networks.lora import respelled_name, sdxl_levels, sdxl_spellings

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"

# How the keys of Diffusers and peft end, after the path of the layer. The latter may have the adapter's name in them.
_ENDS = (
    (r"(?:\.lora_A(?:\.[^.]+)?|(?:\.lora|\.lora_linear_layer|_lora)\.down)\.weight", DOWN),
    (r"(?:\.lora_B(?:\.[^.]+)?|(?:\.lora|\.lora_linear_layer|_lora)\.up)\.weight", UP),
    (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", MAGNITUDE),
    (r"(?:\.lora|\.lora_linear_layer|_lora)?\.alpha", ALPHA),
)
_BEGIN = re.compile(r"(?:base_model\.model\.)?(?:(unet|text_encoder(?:_2)?)\.)?(?:base_model\.model\.)?")
_PARTS_OF_UNETS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_PARTS_OF_TEXT_ENCODERS = ("text_model", "encoder", "embeddings", "text_projection")
_OLD_ATTENTION = re.compile(r"(\.self_attn)\.to_(q|k|v|out)$")

_ORIGINAL = tuple(f"{UNET}_{block}_" for block in ("input_blocks", "middle_block", "output_blocks"))
_DEEPER = re.compile(rf"{UNET}_.*_transformer_blocks_[1-9]\d*_")  # in Stable Diffusion 1 and 2 there is one each
_ATTENTION_OF_OTHERS = (f"{UNET}_down_blocks_0_attentions_", f"{UNET}_down_blocks_3_", f"{UNET}_up_blocks_3_")
_OF_TEXT = re.compile(rf"{UNET}_.*_attn2_to_[kv]$")
_SDXL_WIDTH = 2048  # of its text


class Spelled(NamedTuple):
    """A key as a program spells it: the layer it belongs to, and which part of its change it holds, in our own words.

    `root` and `path`: where the layer is in a Diffusers pipeline, if the key says so.
    """

    name: str
    part: str
    root: str = ""
    path: str = ""


def read_keys(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], unet: nn.Module | None = None
) -> tuple[dict[str, Spelled], bool]:
    """The keys of a file, which has tensors of these shapes, and whether it is for SDXL. What is no key of a network is
    a name of its own, with no part.

    `unet`: of the model that they are for, if it is known, in the layout of networks' names. Otherwise the file tells
    whether that is SDXL, whose published structure is then assumed.
    """
    keys = {key: _read(key) for key in shapes}
    sdxl = _is_sdxl(keys, shapes, metadata) if unet is None else hasattr(unet, "input_blocks")
    if sdxl:
        levels = () if unet is None else (sdxl_levels(unet, "down"), sdxl_levels(unet, "up"))
        spellings = sdxl_spellings(*levels)
        for key, spelled in keys.items():
            name = respelled_name(spelled.name, spellings)
            if spelled.root == "text_encoder":
                name = name.replace(TEXT, f"{TEXT}1", 1)
            keys[key] = spelled._replace(name=name)
    return keys, sdxl


def _read(key: str) -> Spelled:
    name, part = split_key(key.removeprefix("oft_") if key.startswith("oft_") else key)
    name = f"lora_{name}" if key.startswith("oft_") else name
    if name.startswith(STARTS):
        synonym = next((own for end, own in _ENDS if re.fullmatch(end, f".{part}")), part)
        return Spelled(name, synonym)
    begin = _BEGIN.match(key)
    for end, own in _ENDS:
        found = re.search(f"{end}$", key)
        if found:
            root, path = _place(begin.group(1), key[begin.end() : found.start()])
            if root:
                return Spelled(f"{_prefix(root)}_{path}".replace(".", "_"), own, root, path)
    return Spelled(key, "")


def _place(root: str | None, path: str) -> tuple[str | None, str]:
    """The part of a pipeline, and the path in it."""
    path = path.replace(".processor", "")
    first = path.partition(".")[0]
    if root is None and first in _PARTS_OF_UNETS:
        root = "unet"
    elif root is None and first in _PARTS_OF_TEXT_ENCODERS:
        root = "text_encoder"
    if root == "unet" and path.endswith(".to_out"):
        path += ".0"
    elif root is not None and root != "unet":
        path = _OLD_ATTENTION.sub(r"\1.\2_proj", path)
        if first in ("encoder", "embeddings", "final_layer_norm"):
            path = f"text_model.{path}"
    return root, path


def _prefix(root: str) -> str:
    return {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": f"{TEXT}2"}[root]


def _is_sdxl(keys: Mapping[str, Spelled], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bool:
    """Whether the network is for Stable Diffusion XL."""
    if said := metadata.get("ss_base_model_version"):
        return said.startswith("sdxl")
    names = {spelled.name for spelled in keys.values()}
    if _any_begins(names, (f"{TEXT}1_", f"{TEXT}2_", f"{UNET}_add_embedding_", *_ORIGINAL)):
        return True
    if _any_begins(names, _ATTENTION_OF_OTHERS):
        return False
    of_text = [key for key, spelled in keys.items() if spelled.part == DOWN and _OF_TEXT.match(spelled.name)]
    return any(_DEEPER.match(name) for name in names) or any(_SDXL_WIDTH in shapes[key] for key in of_text)


def _any_begins(names: Iterable[str], starts: tuple[str, ...]) -> bool:
    return any(name.startswith(starts) for name in names)
