"""What files of networks say of themselves when a tool has made them."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from library.errors import UserError
from library.lora.reading import NetworkFile
from library.models.family import Family
from library.models.files.checkpoint import Hashes
from library.models.metadata import ESSENTIAL, IMPLEMENTATION_VERSION
from library.models.registry import FAMILIES

LORA_MODULE = "networks.lora"
# What holds for one file alone, or is said anew.
_OF_ONE_FILE = ("sshs_", "modelspec.hash", "modelspec.title", "modelspec.date", "modelspec.implementation")
# What reads text, or what a text encoder is made of: as wide as a text encoder of the published models.
_OF_TEXT_WIDTH = re.compile(
    r"lora_unet_.*_attn2_to_[kv]|lora_te_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc1)"
)
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TEXT_LAYER = re.compile(r"lora_te_text_model_encoder_layers_(\d+)_")
_LAYERS_OF_SD1 = 12


def base_of(network: NetworkFile) -> type[Family] | None:
    """The family of models that a network is for, from its metadata, or else from names and sizes of its layers; None
    if they do not tell.
    """
    names = {family.name: family for family in FAMILIES}
    if network.sdxl:
        return names["sdxl"]
    said = network.metadata.get("ss_base_model_version", "")
    by_version = next((family for family in FAMILIES if said.startswith(family.base_model_version)), None)
    if by_version is not None:
        return by_version
    widths = {network.width(name) for name in network.layers if _OF_TEXT_WIDTH.fullmatch(name)}
    known = {_WIDTHS[width] for width in widths & _WIDTHS.keys()}
    if len(known) == 1:
        return names[known.pop()]
    numbers = [int(found[1]) for name in network.layers if (found := _TEXT_LAYER.match(name))]
    return names["sd2"] if not known and max(numbers, default=0) >= _LAYERS_OF_SD1 else None


def common_base(networks: Sequence[NetworkFile]) -> type[Family] | None:
    """The family that all of them are for, as far as they tell. UserError if they are for different ones."""
    known = [(network, base) for network in networks if (base := base_of(network)) is not None]
    for network, base in known[1:]:
        first, other = known[0]
        if base is not other:
            raise UserError(
                f"{network.path} is for {base.title} and {first.path} for {other.title}: only networks for one "
                "family of models go together"
            )
    return known[0][1] if known else None


def source(name: str, hashes: Hashes | None, **more: Any) -> dict[str, Any]:
    """What a new file says of one that it was made from, which is known by its name, or by its hashes if it is no
    folder.
    """
    return {"name": name, **({} if hashes is None else {"sha256": hashes.sha256}), **more}


def made_by(tool: str, sources: Sequence[Mapping[str, Any]], **parameters: Any) -> dict[str, Any]:
    """What a new file says of the tool that has made it, and of what: each a `source`."""
    return {"tool": tool, "sources": list(sources), **parameters}


def convolution_arguments(ranks: Collection[float], alphas: Collection[float]) -> dict[str, str]:
    """The network arguments that tell the ranks and alphas of convolutions that look at neighbours, if there are any;
    as text, like those of a training.
    """
    return {"conv_dim": _single(ranks), "conv_alpha": _single(alphas)} if ranks else {}


def network_metadata(
    sources: Sequence[NetworkFile],
    base: type[Family] | None,
    title: str,
    ranks: Collection[int],
    alphas: Collection[float],
    *,
    made_by: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    no_metadata: bool = False,
) -> dict[str, str]:
    """The metadata of a LoRA of these `ranks` and `alphas` that was made from other networks, or from models and no
    network: what all sources say of their training, and in JSON what `made_by` gives.

    With `no_metadata` only what programs need to use it. The hashes are added where it is written.
    """
    fields: dict[str, str] = {}
    if sources:
        first, *others = (source.metadata for source in sources)
        shared = {key for key in first if all(other.get(key) == first[key] for other in others)}
        fields = {key: first[key] for key in shared if key.startswith(("ss_", "modelspec."))}
        fields = {key: value for key, value in fields.items() if not key.startswith(_OF_ONE_FILE)}
    if base is not None:
        fields.setdefault("ss_base_model_version", base.base_model_version)  # or the word of all sources, "sd_v2_v"
        fields["ss_v2"] = str(base.name == "sd2")
    fields |= {
        "ss_network_module": LORA_MODULE,
        "ss_network_dim": _single(ranks),
        "ss_network_alpha": _single(alphas),
    }
    fields.pop("ss_network_args", None)
    if arguments:
        fields["ss_network_args"] = json.dumps(arguments)
    if no_metadata:
        return {key: fields[key] for key in ESSENTIAL if key in fields}
    return fields | {
        "ss_made_by": json.dumps(made_by),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": IMPLEMENTATION_VERSION,
    }


def _single(values: Collection[float]) -> str:
    """The one value that all layers have, or the word for several."""
    return f"{next(iter(values)):g}" if len(set(values)) == 1 else "Dynamic"
