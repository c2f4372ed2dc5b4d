"""Networks beside a model whose weights are kept in 8 bits: many compute with these themselves, and cannot."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.models import float8
from library.models.views import AttachPoints
from library.options.network import NetworkOptions
from library.training.methods.network_module import LYCORIS, failing_as_mistake, failure


def _layers(points: AttachPoints) -> list[nn.Module]:
    """Those in 8 bits."""
    layers = [layer for tree in (*points.text_encoders, points.unet) for layer in tree.modules()]
    own = [dict(layer.named_parameters(recurse=False)).get("weight") for layer in layers]
    return [layer for layer, weight in zip(layers, own, strict=True) if getattr(weight, "dtype", None) == float8.FORMAT]


def is_cause(error: UserError, points: AttachPoints) -> bool:
    """Whether what a network has raised comes from weights in 8 bits."""
    raised = error.__cause__
    return isinstance(raised, RuntimeError) and "float8" in str(raised).lower() and bool(_layers(points))


def refusal(options: NetworkOptions, settings: Mapping[str, Any]) -> UserError:
    """For networks that fail on layers of this format. `settings`: all flags by name."""
    name = options.network_module
    flag = "--fp8_base" if settings.get("fp8_base", True) else "--fp8_base_unet"
    passes_by = name != LYCORIS or "bypass_mode" in options.network_keywords
    return UserError(
        f"{flag}: this network of {name} computes with the model's weights itself, which it cannot in 8 bits: drop "
        f"{flag}{'' if passes_by else ', or try --network_args bypass_mode=True'}"
    )


@torch.no_grad()
def try_layers(points: AttachPoints, options: NetworkOptions, settings: Mapping[str, Any]) -> None:
    """One of each kind. UserError for a network that computes with their weights itself, and in their format."""
    tried: dict[tuple[type, ...], nn.Module] = {}
    for layer in _layers(points):
        tried.setdefault((type(layer), type(getattr(layer.forward, "__self__", None))), layer)
    sentence = failure(options.network_module, "forward")
    for layer in tried.values():
        out_of, kernel = layer.weight.shape[1], layer.weight.shape[2:]
        x = torch.zeros(1, out_of, *kernel, device=layer.weight.device, dtype=torch.bfloat16)
        try:
            with (
                torch.autocast(x.device.type, torch.bfloat16, enabled=not x.is_meta),
                failing_as_mistake(sentence, without_values=x.is_meta),
            ):
                if layer(x).dtype != x.dtype:
                    raise UserError("what layers put out has the format of the network")
        except NotImplementedError:  # without values there is nothing to try
            return
        except UserError as error:
            raise refusal(options, settings) from error
