"""Weights that are kept in 8 bits and computed with in the format of their input.

A layer keeps its class, its place and the names of its tensors: networks are attached to it as to any other. Its
`weight` has the same shape and rounded values, which any cast gives back; no cast copy of it outlives the layer's turn.
The format has 4 bits of exponent and 3 of mantissa, up to 448, and neither infinities nor a sign of overflow
(Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(FORMAT).max
_FEWEST_CHANNELS = 16  # layers with fewer, which read and write latents, are small and every value passes them


def store_in_8_bits(module: nn.Module) -> None:
    """Keep the weights of a tree's Linear and Conv2d layers in 8 bits from now on, which train no more. Biases, norms,
    embeddings and layers of few channels stay as they are.
    """
    for layer in filter(takes_8_bits, module.modules()):
        rounded = layer.weight.detach().clamp(-_LARGEST, _LARGEST).to(FORMAT)
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        layer.forward = MethodType(_linear if isinstance(layer, nn.Linear) else _convolved, layer)


def takes_8_bits(layer: nn.Module) -> bool:
    """Whether a module is a layer whose weight can be kept so."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or min(layer.weight.shape[:2]) < _FEWEST_CHANNELS:
        return False
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def values(module: nn.Module) -> int:
    """How many values of a tree can be kept so."""
    return sum(layer.weight.numel() for layer in module.modules() if takes_8_bits(layer))


def names_in_8_bits(module: nn.Module) -> list[str]:
    """The parameters of a tree that are kept so."""
    return [name for name, parameter in module.named_parameters() if parameter.dtype == FORMAT]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Linear.apply(*_cast(layer, x))


def _convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return _Convolution.apply(*_cast(layer, x), (layer.stride, layer.padding, layer.dilation, layer.groups))


def _cast(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias, of which all but the weight are in the format to compute in: autocast's, or the input's.

    Autocast itself would not know of the cast in the backward pass, and might keep a copy of the weight.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.to(dtype), layer.weight, None if layer.bias is None else layer.bias.to(dtype)


class _Linear(torch.autograd.Function):
    """x (..., in), weight (out, in) in 8 bits, bias (out) -> (..., out). Gradients are those of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    """x (B, in, H, W), weight (out, in / groups, kh, kw) in 8 bits, bias (out) -> (B, out, h, w), as `_Linear`.

    `window`: stride, padding, dilation and groups, as of F.conv2d.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.window = x.shape, window
        return F.conv2d(x, weight.to(x.dtype), bias, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return (
            nn.grad.conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.window),
            None,
            None,
            None,
        )
