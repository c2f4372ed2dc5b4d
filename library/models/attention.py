"""How attention is computed in a U-Net and an autoencoder: the same numbers, in other kernels."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FRUGAL = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
_TOKENS = 16  # of the trial


class FrugalAttention(AttnProcessor2_0):
    """torch's attention, but never in the way that holds all weights, (B, heads, tokens, tokens), at once.

    What is used instead goes through them in blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135; Rabe and Staats
    2021, https://arxiv.org/abs/2112.05682).
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        with sdpa_kernel(_FRUGAL):
            return super().__call__(*arguments, **keywords)


_WAYS: dict[str, Callable[[], Any]] = {"mem_eff_attn": FrugalAttention, "xformers": XFormersAttnProcessor}


def use(way: str, module: nn.Module) -> None:
    """Compute attention in a module "mem_eff_attn" or "xformers", by the names of flags."""
    for layer in _layers(module):
        layer.set_processor(_WAYS[way]())


def works(way: str, module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine can train with attention computed so, for the widths of the module's heads: it is tried."""
    widths = {layer.inner_dim // layer.heads: layer.heads for layer in _layers(module)}
    try:
        for width, heads in widths.items():
            layer = Attention(query_dim=width * heads, heads=heads, dim_head=width, processor=_WAYS[way]())
            layer.to(device, dtype)
            x = torch.zeros(1, _TOKENS, width * heads, device=device, dtype=dtype, requires_grad=True)
            torch.autograd.grad(layer(x).sum(), x)
    except Exception:  # whatever a package says that was built for another machine
        return False
    return True


def _layers(module: nn.Module) -> list[Attention]:
    """The layers whose computation can be chosen."""
    return [part for part in module.modules() if isinstance(part, Attention)]
