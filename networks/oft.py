"""Orthogonal fine-tuning of the U-Net (Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

The output features of each adapted layer are cut into `network_dim` blocks of equal size, and each block is rotated:
``W'[k, m] = sum over n of R[k, n, m] W[k, n]`` with ``R = (I + Q)(I - Q)^-1`` and ``Q = B - B^T``. The blocks B alone
are trained. Q's Frobenius norm is kept within alpha times the number of output features; the bias is not rotated.

The paper rotates what goes into each neuron. Rotating what comes out is what files of this kind mean to AUTOMATIC1111's
web UI, ComfyUI and LyCORIS. Layers are named as in networks/lora.py; files that say ``oft_unet_...`` are read, too.
"""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks import lora

logger = logging.getLogger(__name__)

# A new network adapts the attention's own layers in the U-Net, and further ones when asked.
ATTENTION_ENDS = ("_to_q", "_to_k", "_to_v", "_to_out_0")
ARGUMENTS = ("enable_all_linear", "enable_conv")
BLOCKS = "oft_blocks"
OTHER_PREFIX = "oft_unet_"


class OFTModule(nn.Module):
    """The rotation of what one Linear or Conv2d layer puts out.

    `lora_dim` is the number of blocks. `alpha` 0 sets Q no bound. A new rotation is none, because B starts at zero.
    """

    def __init__(
        self, lora_name: str, org_module: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float = 1.0
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.lora_dim = lora_dim
        self.outputs = len(org_module.weight)
        self.is_conv = isinstance(org_module, nn.Conv2d)
        size = self.outputs // lora_dim
        self.oft_blocks = nn.Parameter(torch.zeros(lora_dim, size, size))
        self.org_forward = None
        self.org_module: tuple[nn.Module, ...] = ()  # in a tuple, or it would be a part of this module
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_load_state_dict_post_hook(OFTModule._read_alpha)
        self._read_alpha()

    def _read_alpha(self, _incompatible_keys: Any = None) -> None:
        self.limit = largest_norm(self.alpha.item(), self.outputs)

    def apply_to(self, org_module: nn.Module) -> None:
        """Puts this rotation behind `org_module` and behind any branch that is there already."""
        lora.LoRAModule.apply_to(self, org_module)
        self.org_module = (org_module,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's rotated output, in its dtype: (..., out_features) or (B, C, H, W).

        The output is rotated and not the weight: that takes out / blocks multiplications for each of its values, where
        a rotated weight would have to get gradients as if all of it was trained.
        """
        base = self.org_forward(x, *args, **kwargs)
        if not self.multiplier:
            return base
        turn = (self.multiplier * turning(self.oft_blocks, self.limit)).to(base.dtype)
        change = turned(base, turn, axis=1 if self.is_conv else -1)
        bias = self.org_module[0].bias
        if bias is not None:
            own = turned(bias.to(base.dtype), turn, axis=0)
            change = change - (own[:, None, None] if self.is_conv else own)
        return base + change.to(base.dtype)

    def weight_norm(self) -> Tensor:
        """Frobenius norm of Q over all blocks before it is bounded, scalar."""
        return skew(self.oft_blocks).norm()

    def scale_down(self, ratio: Tensor) -> None:
        """Scales Q with `ratio`, scalar."""
        self.oft_blocks.copy_(self.oft_blocks.float() * ratio)


class OFTNetwork(lora.LoRANetwork):
    """The rotations of a model. A new network has none for text encoders; one made from a file has what is there."""

    module_class = OFTModule

    @classmethod
    def create(
        cls,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        text_encoder: lora.TextEncoders,
        unet: nn.Module | None,
        network_args: Mapping[str, Any],
    ) -> "OFTNetwork":
        if unet is None:
            raise ValueError("OFT rotates what layers of the U-Net put out, and there is no U-Net")
        wanted = _switches(network_args)
        blocks = network_dim or lora.DEFAULT_RANK
        alpha = lora.DEFAULT_ALPHA if network_alpha is None else network_alpha
        if alpha <= 0:
            raise ValueError(f"alpha {alpha:g} lets OFT change nothing: give a network_alpha above 0")
        layers = _layers(unet, **wanted)
        _check_blocks(blocks, layers)
        modules = [cls.module_class(name, layer, multiplier, blocks, alpha) for name, layer in layers.items()]
        return cls(modules, multiplier, lora.spellings_of(unet))

    @classmethod
    def check(
        cls, rank: int | None, sdxl: bool, trained: Collection[str], network_args: Mapping[str, Any]
    ) -> list[str]:
        _switches(network_args)
        return []

    @classmethod
    def from_weights(
        cls,
        multiplier: float,
        text_encoder: lora.TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        network_args: Mapping[str, Any],
    ) -> tuple["OFTNetwork", dict[str, Tensor]]:
        wanted = _switches(network_args)
        layers = lora.find_layers(text_encoder, unet)
        weights_sd = fitting_weights(weights_sd, text_encoder, unet)
        rotated = _by_layer(weights_sd)
        modules = []
        for argument in (name for name, on in wanted.items() if on):
            if rotated.keys().isdisjoint(_layers(unet, **{argument: True}).keys() - _layers(unet).keys()):
                raise ValueError(f"{argument}: these weights have no layer of these, and a network is made as they are")
        for name, parts in rotated.items():
            number, alpha = len(parts[BLOCKS]), parts["alpha"].item()
            modules.append(cls.module_class(name, layers[name], multiplier, number, alpha))
        return cls(modules, multiplier, lora.spellings_of(unet)), weights_sd

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: lora.TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Rotates the model's own weights as `weights_sd` says, at the present multiplier, instead of `apply_to`.

        Computed in float32 on `device` (the weight's own by default) and rounded once, through `dtype` if given.
        """
        layers = lora.find_layers(text_encoder, unet)
        weights_sd = fitting_weights(weights_sd, text_encoder, unet)
        for name, parts in _by_layer(weights_sd).items():
            weight = layers[name].weight
            place = weight.device if device is None else device
            own, limit = weight.to(place, torch.float32), largest_norm(parts["alpha"].item(), len(weight))
            turn = self.multiplier * turning(parts[BLOCKS].to(place), limit)
            weight.copy_((own + turned(own, turn, axis=0)).to(dtype or weight.dtype))

    def own_weights(self, weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under this network's names, with an alpha for every layer (0 where it has none)."""
        layers = _by_layer(lora.respelled(usual_names(weights_sd), self.spellings))
        return {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}


# `network_dim` is the number of blocks, 4 for None, which divides the outputs of every layer; `network_alpha` is the
# bound of Q's norm per output feature, 1 for None. Of the arguments, `enable_all_linear` adapts all Linear and 1x1
# layers of the transformers, and `enable_conv` the layers of residual and sampling blocks, too.
create_network, create_network_from_weights, check_network_args = lora.network_functions(OFTNetwork)


def skew(blocks: Tensor) -> Tensor:
    """Q = B - B^T of each block, in float32. `blocks`: (number, size, size)."""
    blocks = blocks.float()
    return blocks - blocks.mT


def turning(blocks: Tensor, limit: float) -> Tensor:
    """R - I = 2 (I - Q)^-1 Q of each block, in float32, with Q scaled down to the norm `limit` where its is larger.

    `blocks`: (number, size, size), B. What differs from the identity keeps its digits also when it is small.
    """
    q = skew(blocks)
    if math.isfinite(limit):
        q = q * (limit / q.norm().clamp_min(limit))
    identity = torch.eye(q.shape[-1], device=q.device)
    # I - Q can always be inverted; asking whether it was would make the CPU wait for the GPU
    return torch.linalg.solve_ex(identity - q, 2 * q).result


def turned(values: Tensor, turn: Tensor, axis: int) -> Tensor:
    """`values` whose features, along `axis`, are multiplied block by block with `turn` (number, size, size)."""
    blocks = values.movedim(axis, -1).unflatten(-1, turn.shape[:2])
    return torch.einsum("...kn,knm->...km", blocks, turn).flatten(-2).movedim(-1, axis)


def largest_norm(alpha: float, outputs: int) -> float:
    """The bound of Q's norm. LyCORIS writes alpha 0 where it sets none."""
    return alpha * outputs if alpha else math.inf


def usual_names(weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under names that begin as those of other networks do."""
    return {
        f"{lora.UNET_PREFIX}_{key.removeprefix(OTHER_PREFIX)}" if key.startswith(OTHER_PREFIX) else key: tensor
        for key, tensor in weights_sd.items()
    }


def fitting_weights(
    weights_sd: Mapping[str, Tensor], text_encoder: lora.TextEncoders, unet: nn.Module | None
) -> dict[str, Tensor]:
    """The part of an OFT that fits these modules, under its own names and with an alpha for every layer (0 where the
    file has none). Logs what is left out. Raises ValueError if nothing fits, or for another kind of network or size.
    """
    theirs = _by_layer(lora.respelled(usual_names(weights_sd), lora.spellings_of(unet)))
    layers = lora.find_layers(text_encoder, unet)
    fitting = [name for name in theirs if name in layers]
    left_out = theirs.keys() - set(fitting)
    if not fitting:
        raise ValueError(f"nothing in this OFT fits the model: {lora.listing(left_out) or 'it is empty'}")
    for name in fitting:
        _check_parts(name, len(layers[name].weight), theirs[name])
    if left_out:
        logger.warning("%d parts of the OFT fit no layer and are ignored: %s", len(left_out), lora.listing(left_out))
    return {f"{name}.{part}": tensor for name in fitting for part, tensor in theirs[name].items()}


def _by_layer(weights_sd: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and part, each layer with an alpha."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights_sd.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, {})[part] = tensor.reshape(()) if part == "alpha" else tensor
    for parts in layers.values():
        parts.setdefault("alpha", torch.tensor(0.0))
    return layers


def _check_parts(name: str, outputs: int, parts: Mapping[str, Tensor]) -> None:
    blocks = parts.get(BLOCKS)
    if blocks is None or blocks.dim() != 3 or parts.keys() != {BLOCKS, "alpha"}:
        raise ValueError(f"{name} is no OFT of one rotation for each block: it has {', '.join(sorted(parts))}")
    number, *sizes = blocks.shape
    if sizes != [outputs // number] * 2 or outputs % number:
        raise ValueError(
            f"{name} has {number} blocks of {sizes[0]}x{sizes[1]}, but the model's layer has {outputs} outputs; the "
            "OFT was made for another kind of model"
        )


def _layers(unet: nn.Module, enable_all_linear: bool = False, enable_conv: bool = False) -> dict[str, nn.Module]:
    """The layers of a new network, by name."""
    inside = lora.find_layers(None, unet, unet_targets=lora.UNET_TARGETS)
    if enable_all_linear:
        found = {n: layer for n, layer in inside.items() if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)}
    else:
        found = {name: layer for name, layer in inside.items() if name.endswith(ATTENTION_ENDS)}
    if enable_conv:
        found |= lora.find_layers(None, unet, unet_targets=lora.UNET_TARGETS_OF_CONVOLUTIONS)
    if not found:
        raise ValueError("found no layer to rotate in the U-Net")
    return found


def _check_blocks(number: int, layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if a layer cannot be cut into so many blocks."""
    outputs = {name: len(layer.weight) for name, layer in layers.items()}
    name = next((name for name, size in outputs.items() if size % number), None)
    if name is not None:
        common = math.gcd(*outputs.values())
        fitting = sorted((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - number), n))[:5]
        raise ValueError(
            f"network_dim {number} is the number of blocks and does not divide the {outputs[name]} outputs of {name}: "
            f"use {', '.join(map(str, sorted(fitting)))} or another divisor of {common}"
        )


def _switches(network_args: Mapping[str, Any]) -> dict[str, bool]:
    """The network arguments there are, as truth values; from a command line they come as text."""
    given = {name: value for name, value in network_args.items() if value is not None}
    if lora.read_chance("dropout", given.pop("dropout", 0)):
        raise ValueError("OFT has nothing that could be dropped out: leave dropout and --network_dropout out")
    lora.check_names(given, ARGUMENTS)
    return {name: lora.read_switch(name, given.get(name, False)) for name in ARGUMENTS}
