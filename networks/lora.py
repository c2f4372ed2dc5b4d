"""LoRA for the U-Net and the text encoders of Stable Diffusion (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Each adapted layer computes ``W x + multiplier * alpha / rank * up(down(x))``; only ``down`` and ``up`` are trained.
With DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) the norms of the sum's rows are trained, too, apart from
their directions; with ``train_norm`` the normalisations beside the adapted layers.

This file stands alone: copied out of the project it needs torch and safetensors, and works on the modules of a
Diffusers pipeline. A layer is named by its path in the model, dots turned into underscores, after ``lora_unet_``,
``lora_te_`` or, with two text encoders, ``lora_te1_`` and ``lora_te2_``. The U-Net of SDXL is the exception: its names
are those of the original layout, whether the U-Net is handed in as Diffusers builds it or as a tree with these names.
"""

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

logger = logging.getLogger(__name__)

TextEncoders = nn.Module | Sequence[nn.Module] | None
StrPath = str | os.PathLike[str]
T = TypeVar("T")

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0
UNET_PREFIX = "lora_unet"
TEXT_ENCODER_PREFIX = "lora_te"
PARTS = {"unet": "the U-Net", "text_encoder": "the text encoder"}
# A new network adapts the layers inside modules of these classes; one made from a file adapts whatever the file names.
TEXT_ENCODER_TARGETS = frozenset({"CLIPAttention", "CLIPMLP"})
UNET_TARGETS = frozenset({"Transformer2DModel"})
# A network with convolutions adapts these as well.
UNET_TARGETS_OF_CONVOLUTIONS = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
# The blocks of a U-Net that values can be given for: how many there are, and which of them are the down, middle and up
# ones. SDXL's first one, which embeds time and sizes, and its last one, the last layers, are none of these.
BLOCKS, BLOCKS_OF_SDXL = 25, 23
HALVES = {"down": range(12), "mid": range(12, 13), "up": range(13, 25)}
HALVES_OF_SDXL = {"down": range(1, 10), "mid": range(10, 13), "up": range(13, 22)}
LAYERS = nn.Linear | nn.Conv2d
NORMS = nn.LayerNorm | nn.GroupNorm
LARGEST_RANK = 1 << 16  # more than any layer has inputs or outputs
_SMALLEST_NORM = 1e-12  # of weights that are all zero: nothing is divided by less


# What stands beside the layers.


class LoRAModule(nn.Module):
    """The low-rank branch of one Linear or Conv2d layer.

    `lora_down` keeps a convolution's kernel, stride and padding; `lora_up` is then 1x1. `alpha` None or 0 means the
    rank. A new branch adds nothing, because `lora_up` starts at zero. While training, `dropout` is the chance of each
    value between the two to be zeroed, `rank_dropout` that of each of the rank's directions, in a whole sample, and
    `module_dropout` that of the branch, in a whole forward; the first two scale up what they keep.
    """

    plus_parameters: ClassVar[tuple[str, ...]] = ("lora_up",)
    """How the names of the parameters begin that LoRA+ moves faster."""

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = DEFAULT_RANK,
        alpha: float | None = None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.lora_dim = lora_dim
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.org_forward: Callable[..., Tensor] | None = None
        if isinstance(org_module, nn.Conv2d):
            window = {key: getattr(org_module, key) for key in ("kernel_size", "stride", "padding", "dilation")}
            self.lora_down = skip_init(nn.Conv2d, org_module.in_channels, lora_dim, bias=False, **window)
            self.lora_up = skip_init(nn.Conv2d, lora_dim, org_module.out_channels, kernel_size=1, bias=False)
        else:
            self.lora_down = skip_init(nn.Linear, org_module.in_features, lora_dim, bias=False)
            self.lora_up = skip_init(nn.Linear, lora_dim, org_module.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim)))
        self.register_load_state_dict_post_hook(LoRAModule._read_alpha)
        self._read_alpha()

    def _read_alpha(self, _incompatible_keys: Any = None) -> None:
        # A plain number: reading the buffer in every forward would make the CPU wait for the GPU.
        self.scale = self.alpha.item() / self.lora_dim

    def weight_norm(self) -> Tensor:
        """Frobenius norm of alpha / rank * up @ down, scalar: |up down|^2 = tr((up^T up)(down down^T))."""
        up, down = self.lora_up.weight.flatten(1).float(), self.lora_down.weight.flatten(1).float()
        return ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0).sqrt() * self.scale

    def scale_down(self, ratio: Tensor) -> None:
        """Multiplies up @ down with `ratio`, scalar, both factors alike."""
        factor = ratio.sqrt()
        for weight in (self.lora_up.weight, self.lora_down.weight):
            weight.copy_(weight.float() * factor)

    def apply_to(self, org_module: nn.Module) -> None:
        """Puts this branch beside `org_module`, on top of any branch that is there already."""
        if self.org_forward is not None:
            raise RuntimeError(f"{self.lora_name} is already applied; make another network to apply it once more")
        self.org_forward = org_module.forward
        org_module.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output plus the branch's, in the layer's dtype.

        `x`: (..., in_features) or (B, C, H, W). The branch computes in its own dtype, or in autocast's.
        """
        scale = self.multiplier * self.scale
        if not scale:
            return self.org_forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            # Layer and branch would each make and keep their own cast copy of the input.
            x = branch_input = x.to(torch.get_autocast_dtype(x.device.type))
        else:
            branch_input = x.to(self.lora_down.weight.dtype)
        base = self.org_forward(x, *args, **kwargs)
        with_branch = self._with_branch(x, branch_input, base, scale)
        if self.training and self.module_dropout:
            # The branch is computed all the same: every process then has a gradient for every parameter.
            kept = torch.rand((), device="cpu") >= self.module_dropout
            return torch.where(kept.to(base.device, non_blocking=True), with_branch, base)
        return with_branch

    def _with_branch(self, x: Tensor, branch_input: Tensor, base: Tensor, scale: float) -> Tensor:
        """`base`, the layer's output, with what the branch adds. `branch_input`: x in the dtype it computes in."""
        return self._add_branch(x, base, self._dropped(self._project(branch_input)), scale)

    def _project(self, x: Tensor) -> Tensor:
        """The rank's values of the input."""
        return self.lora_down(x)

    def _dropped(self, hidden: Tensor) -> Tensor:
        """What the dropouts leave of the values between down and up, (B, ..., rank) or (B, rank, H, W).

        What a sample loses is drawn by the CPU's generator, which gradient checkpointing winds back.
        """
        if not self.training:
            return hidden
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            sizes = [1] * hidden.dim()
            sizes[0] = len(hidden)
            sizes[1 if isinstance(self.lora_down, nn.Conv2d) else -1] = self.lora_dim
            kept = (torch.rand(sizes, device="cpu") >= self.rank_dropout) / (1 - self.rank_dropout)
            hidden = hidden * kept.to(hidden.device, hidden.dtype, non_blocking=True)
        return hidden

    def _add_branch(self, x: Tensor, base: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """base + scale * up(hidden), with one temporary of the output's size less than the formula where possible."""
        up = self.lora_up.weight
        if up.dim() == 2 and hidden.dtype == base.dtype:
            rows = base.reshape(-1, base.shape[-1])
            return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scale).view(base.shape)
        return base + self.lora_up(hidden * scale).to(base.dtype)


class DoRAModule(LoRAModule):
    """A branch with which the layer's weight W becomes W' = m * V / |V|, where V = W + alpha / rank * up @ down.

    |V| are the norms of V's rows, over inputs and kernel, and m their trained successors, `dora_scale` of shape
    (out, 1) or (out, 1, 1, 1), which begin as the norms of W (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    The multiplier x leads from W to W' in a straight line, W + x (W' - W), as in AUTOMATIC1111's web UI, ComfyUI and
    LyCORIS; peft multiplies up @ down with it instead, which is the same at 1 alone.
    """

    axis = 0
    """Of the weight: there is a norm for each place along it."""

    def __init__(self, lora_name: str, org_module: nn.Module, *arguments: Any, **keywords: Any) -> None:
        super().__init__(lora_name, org_module, *arguments, **keywords)
        self.org_module = (org_module,)  # in a tuple it does not become part of the network
        self.plain_forward: Callable[..., Tensor] | None = None
        self.others_below = False
        norms = _weight_norms(org_module.weight.detach(), self.axis)
        # A model without values, as of a dry run, has no norms, and what is trained has values nevertheless.
        start = torch.ones(norms.shape) if norms.is_meta else norms.to(self.lora_up.weight.device)
        self.dora_scale = nn.Parameter(start)

    def apply_to(self, org_module: nn.Module) -> None:
        """As LoRAModule; the norms are those of the layer's own weight, whatever other networks add to its output."""
        super().apply_to(org_module)
        self.org_module, self.plain_forward = (org_module,), self.org_forward
        while isinstance(below := getattr(self.plain_forward, "__self__", None), LoRAModule):
            self.plain_forward, self.others_below = below.org_forward, True

    def _add_branch(self, x: Tensor, base: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """base + multiplier * ((m / |V| - 1) * W x + m / |V| * alpha / rank * up(hidden)), with the bias left alone.

        What is added is summed up first, so that it is rounded to base's size but once.
        """
        layer, up = self.org_module[0], self.lora_up.weight
        own = self.plain_forward(x) if self.others_below else base
        gain = self._gain()
        change = self._along(self.multiplier * (gain - 1)).to(base.dtype)
        if layer.bias is None:
            added = own * change
        else:
            added = torch.addcmul(self._along(layer.bias.to(base.dtype)) * -change, own, change)
        up = (up * (scale * gain)).to(hidden.dtype)
        return base + (added + self._raise(hidden, up).to(base.dtype))

    def _raise(self, hidden: Tensor, up: Tensor) -> Tensor:
        return F.linear(hidden, up) if up.dim() == 2 else F.conv2d(hidden, up)

    def _along(self, values: Tensor) -> Tensor:
        """One value for each place along an axis of the weight, shaped for the layer's input or output."""
        return values.view(-1) if self.lora_up.weight.dim() == 2 else values.view(-1, 1, 1)

    def _gain(self) -> Tensor:
        """m / |V|, float32, of dora_scale's shape. |V| is a constant to gradients, as in section 4.3 of the paper."""
        return self.dora_scale.float() / self._norms_of_sum()

    @torch.no_grad()
    def _norms_of_sum(self) -> Tensor:
        """|V|, of dora_scale's shape, in float32 and without V: |w + d|^2 = |w|^2 + 2 <w, d> + |d|^2 with d = up down.

        Exactly those of W while up @ down is zero.
        """
        weight = self.org_module[0].weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            norms = _weight_norms(weight, self.axis).clamp_min(_SMALLEST_NORM)
            up, down = self.lora_up.weight.flatten(1).float(), self.lora_down.weight.flatten(1).float()
            added = self._added_squares(weight.flatten(1), up, down)
            return norms * (1 + added.view(norms.shape) / norms.square()).clamp_min(0).sqrt().clamp_min(_SMALLEST_NORM)

    def _added_squares(self, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """|w + d|^2 - |w|^2 for each row of the flattened weight, (out, in x kernel)."""
        cross, square = weight @ down.t(), up @ (down @ down.t())
        return (up * (2 * self.scale * cross + self.scale**2 * square)).sum(1)


class InputDoRAModule(DoRAModule):
    """DoRA whose norms are those of V's columns, over outputs and kernel: `dora_scale` is (1, in) or (1, in, 1, 1).

    What LyCORIS calls wd_on_output=False. It costs the layer a second pass, since all of its input changes.
    """

    axis = 1

    def _with_branch(self, x: Tensor, branch_input: Tensor, base: Tensor, scale: float) -> Tensor:
        """base + multiplier * (W (x * (g - 1)) + alpha / rank * up(down(x * g))), g = m / |V|; the bias left alone."""
        bias, gain = self.org_module[0].bias, self._along(self._gain())
        hidden = self._dropped(self._project(branch_input * gain.to(branch_input.dtype)))
        added = self.plain_forward(x * (self.multiplier * (gain - 1)).to(x.dtype))
        if bias is not None:
            added = added - self._along(bias).to(added.dtype)
        return base + (added + self._raise(hidden * scale, self.lora_up.weight).to(base.dtype))

    def _added_squares(self, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """As above, for each input: (rank, in x kernel) is summed up over ranks and kernel."""
        cross, square = up.t() @ weight, up.t() @ up @ down
        parts = down * (2 * self.scale * cross + self.scale**2 * square)
        return parts.view(len(down), self.dora_scale.shape[1], -1).sum((0, 2))


class NormModule(nn.Module):
    """What is added to weight and bias of a LayerNorm or GroupNorm: `w_norm`, `b_norm` (channels), zero at first."""

    def __init__(self, lora_name: str, org_module: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.org_module = (org_module,)
        self.org_forward: Callable[..., Tensor] | None = None
        self.below: tuple[NormModule, ...] = ()
        self.w_norm = nn.Parameter(torch.zeros(org_module.weight.shape))
        if org_module.bias is not None:
            self.b_norm = nn.Parameter(torch.zeros(org_module.bias.shape))

    def apply_to(self, org_module: nn.Module) -> None:
        """As LoRAModule."""
        if self.org_forward is not None:
            raise RuntimeError(f"{self.lora_name} is already applied; make another network to apply it once more")
        below = getattr(org_module.forward, "__self__", None)
        self.below = (below,) if isinstance(below, NormModule) else ()
        self.org_module, self.org_forward = (org_module,), org_module.forward
        org_module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The normalisation with the sums. `x`: (..., channels) for a LayerNorm, (B, channels, ...) for a GroupNorm."""
        if not self.multiplier:
            return self.org_forward(x)
        norm, (weight, bias) = self.org_module[0], self.sums()
        if not torch.is_autocast_enabled(x.device.type):  # it casts all three to one format, these would be two
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with what this network and those applied before it add, in float32."""
        norm = self.org_module[0]
        weight, bias = self.below[0].sums() if self.below else (norm.weight, norm.bias)
        weight = weight.float() + self.multiplier * self.w_norm
        return weight, None if bias is None else bias.float() + self.multiplier * self.b_norm


def _weight_norms(weight: Tensor, axis: int) -> Tensor:
    """Norm of each of the parts that a weight has along this axis, in float32, with all other sizes 1."""
    others = [other for other in range(weight.dim()) if other != axis]
    return torch.linalg.vector_norm(weight.float(), dim=others, keepdim=True)


# The names of layers, and the blocks that they are in.


def find_layers(
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    text_encoder_targets: Collection[str] | None = None,
    unet_targets: Collection[str] | None = None,
    kinds: UnionType = LAYERS,
) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers by LoRA name: all of them, or those inside modules of the target classes.

    `kinds` may be other classes of them, such as NORMS: these stand beside such modules, too.
    """
    layers: dict[str, nn.Module] = {}
    several = isinstance(text_encoder, Sequence | nn.ModuleList)
    encoders = list(text_encoder) if several else [text_encoder]
    for number, encoder in enumerate(encoders, start=1):
        if encoder is not None:
            prefix = f"{TEXT_ENCODER_PREFIX}{number}_" if len(encoders) > 1 else f"{TEXT_ENCODER_PREFIX}_"
            # transformers 5 took the text_model level out of CLIPTextModel; in LoRA files it is part of the name.
            if not any(name == "text_model" for name, _ in encoder.named_children()):
                prefix += "text_model_"
            layers |= _layers_within(encoder, prefix, text_encoder_targets, kinds)
    if unet is not None:
        layers |= respelled(_layers_within(unet, f"{UNET_PREFIX}_", unet_targets, kinds), spellings_of(unet))
    return layers


def _layers_within(
    root: nn.Module, prefix: str, targets: Collection[str] | None, kinds: UnionType
) -> dict[str, nn.Module]:
    if targets is None:
        found = dict(root.named_modules())
    else:
        scopes = [path for path, module in root.named_modules() if type(module).__name__ in targets]
        found = {}
        for scope in scopes:
            around = scope.rpartition(".")[0]
            beside = root.get_submodule(around).named_children()
            found |= {f"{around}.{name}".lstrip("."): module for name, module in beside if isinstance(module, NORMS)}
            found |= dict(root.get_submodule(scope).named_modules(prefix=scope))
    return {
        prefix + path.replace(".", "_"): layer
        for path, layer in found.items()
        if isinstance(layer, kinds) and layer.weight is not None
    }


def _is_large(layer: nn.Module) -> bool:
    """Whether it is a convolution that looks at more than one place."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


_PLACE = re.compile(
    rf"{UNET_PREFIX}_(?:(?P<half>down|up)_blocks_(?P<level>\d+)_(?P<kind>[a-z]+)_(?P<layer>\d+)_|(?P<mid>mid)_block_"
    r"|(?P<original>input_blocks|middle_block|output_blocks)_(?P<number>\d+)_)"
)
_HALVES_OF_ORIGINAL = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}


def unet_block(name: str) -> int | None:
    """The block of the U-Net that the layer of this LoRA name is in, in the order in which blocks are given values.

    Stable Diffusion 1 and 2 have 25: 0 is the first convolution, then come three for each level, the middle, 12, and
    again three for each level. SDXL has 23: 0 embeds time and sizes, 1-9 are the input blocks, 10-12 the middle ones,
    13-21 the output blocks and 22 the last layers. None for what stands at the ends of the U-Net and in text encoders.
    Raises ValueError for a U-Net that has more.
    """
    place = _PLACE.match(name)
    if place is None:
        return None
    if original := place["original"]:
        halves, half, number = HALVES_OF_SDXL, _HALVES_OF_ORIGINAL[original], int(place["number"])
    elif place["mid"]:
        halves, half, number = HALVES, "mid", 0
    else:
        halves, half = HALVES, place["half"]
        number = 3 * int(place["level"]) + (2 if place["kind"].endswith("samplers") else int(place["layer"]))
        number += half == "down"
    if number >= len(halves[half]):
        raise ValueError(f"{name} is in a U-Net with more blocks than values can be given for: leave them out")
    return halves[half][number]


# The levels of a half of a U-Net: whether each of its ResNets has an attention, and whether a sampler ends it.
Levels = Sequence[tuple[Sequence[bool], bool]]
SDXL_DOWN: Levels = (((False,) * 2, True), ((True,) * 2, True), ((True,) * 2, False))
SDXL_UP: Levels = (((True,) * 3, True), ((True,) * 3, True), ((False,) * 3, False))
# The original layout's names for the U-Net of SDXL, whose blocks it numbers through all levels.
_SDXL_ENDS = (
    ("conv_in", "input_blocks_0_0"),
    ("time_embedding_linear_1", "time_embed_0"),
    ("time_embedding_linear_2", "time_embed_2"),
    ("add_embedding_linear_1", "label_emb_0_0"),
    ("add_embedding_linear_2", "label_emb_0_2"),
    ("conv_norm_out", "out_0"),
    ("conv_out", "out_2"),
)
_SDXL_RESNET = (
    ("norm1", "in_layers_0"),
    ("conv1", "in_layers_2"),
    ("time_emb_proj", "emb_layers_1"),
    ("norm2", "out_layers_0"),
    ("conv2", "out_layers_3"),
    ("conv_shortcut", "skip_connection"),
)


def spellings_of(unet: nn.Module | None) -> dict[str, str]:
    """`sdxl_spellings` for an SDXL U-Net with either layout's names; {} for other models."""
    if not hasattr(unet, "add_embedding") and not hasattr(unet, "input_blocks"):
        return {}
    return sdxl_spellings(sdxl_levels(unet, "down"), sdxl_levels(unet, "up"))


def sdxl_spellings(down: Levels = SDXL_DOWN, up: Levels = SDXL_UP) -> dict[str, str]:
    """How Diffusers' names begin -> how the original ones do, for an SDXL U-Net of these levels."""
    resnets = [("mid_block_resnets_0", "middle_block_0"), ("mid_block_resnets_1", "middle_block_2")]
    parts = [*_SDXL_ENDS, ("mid_block_attentions_0", "middle_block_1")]
    for half, levels, blocks, number in (("down", down, "input_blocks", 1), ("up", up, "output_blocks", 0)):
        for index, (attentions, has_sampler) in enumerate(levels):
            level = f"{half}_blocks_{index}"
            for layer, has_attention in enumerate(attentions):
                resnets.append((f"{level}_resnets_{layer}", f"{blocks}_{number}_0"))
                if has_attention:
                    parts.append((f"{level}_attentions_{layer}", f"{blocks}_{number}_1"))
                number += 1
            if has_sampler and half == "down":  # a block of its own
                parts.append((f"{level}_downsamplers_0_conv", f"{blocks}_{number}_0_op"))
                number += 1
            elif has_sampler:  # the end of the level's last block
                parts.append((f"{level}_upsamplers_0_conv", f"{blocks}_{number - 1}_{1 + has_attention}_conv"))
    for diffusers, original in resnets:
        parts += [(f"{diffusers}_{theirs}", f"{original}_{own}") for theirs, own in _SDXL_RESNET]
    return {f"{UNET_PREFIX}_{diffusers}": f"{UNET_PREFIX}_{original}" for diffusers, original in parts}


def sdxl_levels(unet: nn.Module, half: str) -> Levels:
    """Those of a half, "down" or "up", of an SDXL U-Net with either layout's names."""
    if hasattr(unet, "add_embedding"):
        return [
            ([hasattr(level, "attentions")] * len(level.resnets), getattr(level, f"{half}samplers") is not None)
            for level in getattr(unet, f"{half}_blocks")
        ]
    levels: list[tuple[list[bool], bool]] = []
    attentions: list[bool] = []
    blocks = dict((unet.input_blocks if half == "down" else unet.output_blocks).named_children())
    for number in sorted(blocks, key=int):
        contents = {name for part in blocks[number].children() for name, _ in part.named_children()}
        if "in_layers" in contents:
            attentions.append("transformer_blocks" in contents)
        if contents & {"op", "conv"}:  # the convolution of a down- or upsampler
            levels.append((attentions, True))
            attentions = []
    return [*levels, (attentions, False)]


def respelled(by_key: Mapping[str, T], spellings: Mapping[str, str]) -> dict[str, T]:
    """`by_key` with the network's layer names. Its keys are names alone, or those of a file: <name>.<tensor>."""
    renamed: dict[str, T] = {}
    for key, value in by_key.items():
        name, dot, part = key.partition(".")
        own_key = respelled_name(name, spellings) + dot + part
        if own_key in renamed:
            raise ValueError(f"the LoRA has two tensors for {own_key}, under the names of two layouts")
        renamed[own_key] = value
    return renamed


def respelled_name(name: str, spellings: Mapping[str, str]) -> str:
    """The name of a layer whose beginning is one of `spellings`, with the other one; any other as it is."""
    head = name
    while head and head not in spellings:
        head = head.rpartition("_")[0]
    return spellings[head] + name[len(head) :] if head else name


def _lora_names(keys: Iterable[str]) -> list[str]:
    """Module names of these keys, each once, in order."""
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


# Network arguments. A value is a text, as from a command line, or a number; several are separated by commas.


@dataclass(frozen=True)
class NetworkArguments:
    """What the arguments of a network say, as numbers; None for what is not given.

    Values of blocks are one for each of the U-Net's blocks as they run; see `unet_block`.
    """

    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    conv_dim: int | None = None
    conv_alpha: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_weights: tuple[float, ...] | None = None
    """What the U-Net's learning rate is multiplied with."""
    block_lr_zero_threshold: float = 0.0
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    dora_wd: bool = False
    wd_on_output: bool = True
    """Whether the magnitudes of DoRA belong to outputs, and not to inputs."""
    train_norm: tuple[str, ...] = ()
    """How the names begin of the normalisations that are trained."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a relative's own, as they are given."""
    remarks: tuple[str, ...] = ()
    """What is probably not meant, a sentence each."""

    @classmethod
    def read(cls, given: Mapping[str, Any], known: Collection[str], sdxl: bool) -> "NetworkArguments":
        """From texts, as a command line has them, or numbers. `known`: those that the network reads; `sdxl`: whether
        the U-Net's blocks are counted as SDXL's. Raises ValueError for unknown names, wrong values, and arguments that
        do nothing without others.
        """
        given = {name: value for name, value in given.items() if value is not None}
        check_names(given, known)
        read: dict[str, Any] = {name: _READERS[name](name, given[name]) for name in _READERS if name in given}
        for name in (name for name in given if name in _OF_BLOCKS):
            blocks = BLOCKS_OF_SDXL if sdxl else BLOCKS
            read[name] = tuple(_OF_BLOCKS[name](name, value) for value in _several(given[name]))
            if len(read[name]) != blocks:
                of = "SDXL" if sdxl else "Stable Diffusion 1 and 2"
                raise ValueError(
                    f"{name}: {len(read[name])} values for the {blocks} blocks of {of}'s U-Net, give {blocks}"
                )
        _check_needs(given, read)
        weights, remarks = _block_weights(given, sdxl)
        others = {name: value for name, value in given.items() if name not in ARGUMENTS}
        return cls(block_weights=weights, others=others, remarks=tuple(remarks), **read)

    @property
    def dora_class(self) -> type[DoRAModule] | None:
        """The class of DoRA's modules, if they are asked for."""
        return (DoRAModule if self.wd_on_output else InputDoRAModule) if self.dora_wd else None

    @property
    def adapts_convolutions(self) -> bool:
        """Whether the ResNet blocks and samplers of the U-Net have branches, too."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    def rate_of(self, block: int | None) -> float:
        """What the learning rate of a block of the U-Net is multiplied with."""
        return 1.0 if block is None or self.block_weights is None else self.block_weights[block]

    def leaves_out(self, name: str) -> bool:
        """Whether the layer is in a block of the U-Net that is not trained, because its rate is too small."""
        block = None if self.block_weights is None else unet_block(name)
        return block is not None and self.rate_of(block) <= self.block_lr_zero_threshold

    def size_of(self, name: str, layer: nn.Module, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the layer's branch in a network of these; at rank 0 it has none."""
        if _is_large(layer):
            rank, alpha = self.conv_dim or 0, DEFAULT_ALPHA if self.conv_alpha is None else self.conv_alpha
            ranks, alphas = self.conv_block_dims, self.conv_block_alphas
        else:
            ranks, alphas = self.block_dims, self.block_alphas
        block = unet_block(name) if ranks else None
        if block is not None:
            rank, alpha = ranks[block], alpha if alphas is None else alphas[block]
        return rank, alpha

    def check_describes(self, name: str, layer: nn.Module, rank: int, alpha: float) -> None:
        """ValueError if they ask for another rank or alpha of a layer than its branch in a file has."""
        if _is_large(layer) and not self.adapts_convolutions:
            return
        wanted_rank, wanted_alpha = self.size_of(name, layer, rank, alpha)
        alphas = (self.conv_alpha, self.conv_block_alphas) if _is_large(layer) else (self.block_alphas,)
        says_alpha = any(value is not None for value in alphas)
        if wanted_rank != rank or (says_alpha and (wanted_alpha or rank) != alpha):
            raise ValueError(
                f"{name} has rank {rank} and alpha {alpha:g} in the file, but the arguments say {wanted_rank} and "
                f"{wanted_alpha:g}: leave out those for ranks and alphas, which are the file's"
            )

    def plus_ratio(self, part: str) -> float | None:
        """How many times the rate LoRA+ moves up at (Hayou et al. 2024, https://arxiv.org/abs/2402.12354), in a `part`:
        unet or text_encoder.
        """
        own = getattr(self, f"loraplus_{part}_lr_ratio")
        return self.loraplus_lr_ratio if own is None else own


_WEIGHTS_OF_HALVES = tuple(f"{half}_lr_weight" for half in HALVES)
# The arguments of a LoRA network.
ARGUMENTS = frozenset({own.name for own in fields(NetworkArguments)} - {"block_weights", "others", "remarks"}).union(
    _WEIGHTS_OF_HALVES
)


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """ValueError for arguments that the network does not read."""
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    close = [difflib.get_close_matches(name, sorted(known), 1) for name in unknown]
    meant = ", ".join(dict.fromkeys(name for names in close for name in names))
    advice = f"did you mean {meant}?" if meant else f"this network knows: {', '.join(sorted(known))}"
    raise ValueError(f"unknown network argument {', '.join(unknown)}; {advice}")


def read_number(name: str, value: Any) -> float:
    """A number of 0 or more. ValueError for anything else, as in all of these."""
    number = float(value) if _is_number(value) else math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a number of 0 or more, not {value!r}")
    return number


def read_whole_number(name: str, value: Any, least: int = 0) -> int:
    """From `least` to LARGEST_RANK."""
    number = float(value) if _is_number(value) else math.nan
    if not (least <= number <= LARGEST_RANK and number.is_integer()):
        raise ValueError(f"{name} must be a whole number from {least} to {LARGEST_RANK}, not {value!r}")
    return int(number)


def read_chance(name: str, value: Any) -> float:
    """From 0 to below 1; nothing is 0."""
    chance = float(value or 0) if _is_number(value or 0) else math.nan
    if not 0 <= chance < 1:
        raise ValueError(f"the network's {name} must be at least 0 and below 1, not {value!r}")
    return chance


def _ratio(name: str, value: Any) -> float:
    if not (ratio := read_number(name, value)):
        raise ValueError(f"{name} must be above 0, or lora_up would never be trained, not {value!r}")
    return ratio


def read_switch(name: str, value: Any) -> bool:
    """True or False, in any case, or 1 or 0."""
    text = str(value).strip().lower()
    if text not in ("true", "1", "false", "0"):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return text in ("true", "1")


def _starts_of_norms(name: str, value: Any) -> tuple[str, ...]:
    known = {"true": (UNET_PREFIX, TEXT_ENCODER_PREFIX), "unet": (UNET_PREFIX,), "text_encoder": (TEXT_ENCODER_PREFIX,)}
    known |= {"1": known["true"], "false": (), "0": ()}
    if str(value).lower() not in known:
        raise ValueError(f"{name} must be True, False, unet or text_encoder, not {value!r}")
    return known[str(value).lower()]


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, Sequence) else [value]


def _check_needs(given: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """ValueError for arguments that do nothing, as others are not `given` or, as `read`, are off or 0."""
    asked = {name: read.get(name, True) for name in given}
    on = {name for name, value in asked.items() if (any(value) if isinstance(value, tuple) else value)}
    for name, (wanted, meaning) in _NEEDS.items():
        if name in given and on.isdisjoint(wanted):
            raise ValueError(f"{name} has no effect without {' or '.join(wanted)}, {meaning}: give it or drop {name}")


def _without_effect(given: Mapping[str, Any], part: str) -> list[str]:
    """The names of the arguments among these that only concern a `part`, one of PARTS."""
    norms_alone = str(given.get("train_norm")).lower() == part
    return [name for name in given if name in _OF_PART[part] or (name == "train_norm" and norms_alone)]


def _block_weights(given: Mapping[str, Any], sdxl: bool) -> tuple[tuple[float, ...] | None, list[str]]:
    """The learning rate's factor for each block, 1 where none is given, or None if there are none at all; and remarks
    on halves of which some blocks have none.
    """
    if not any(name in given for name in _WEIGHTS_OF_HALVES):
        return None, []
    weights, remarks = [1.0] * (BLOCKS_OF_SDXL if sdxl else BLOCKS), []
    for half, blocks in (HALVES_OF_SDXL if sdxl else HALVES).items():
        name = f"{half}_lr_weight"
        if name in given:
            own = _weights_of_half(name, given[name], len(blocks))
            weights[blocks.start : blocks.start + len(own)] = own
            if len(own) < len(blocks):
                remarks.append(f"{name} has values for {len(own)} of {len(blocks)} blocks, the further ones have 1")
    return tuple(weights), remarks


def _weights_of_half(name: str, value: Any, count: int) -> list[float]:
    """Numbers, or a preset with or without `+x`, for so many blocks or the first of these."""
    preset, plus, more = (part.strip() for part in value.partition("+")) if isinstance(value, str) else ("", "", "")
    values = _several(value)
    if len(values) > 1 and any(str(each).partition("+")[0].strip() in _PRESETS for each in values):
        raise ValueError(f"{name}: {value!r} has more than one curve or number: give one curve, or numbers alone")
    if preset in _PRESETS:
        if count == 1 and preset != "zeros":
            raise ValueError(
                f"{name}: {preset} is a curve over several blocks, and this U-Net has one here: give a number"
            )
        if plus and not _is_number(more):
            raise ValueError(f"{name}: after {preset}+ there must be a number of 0 or more, not {more!r}")
        added = read_number(name, more) if plus else 0.0
        return [_PRESETS[preset](block / max(1, count - 1)) + added for block in range(count)]
    if plus and not preset:
        raise ValueError(f"{name}: {value!r} adds to no curve, as sine+0.5 does: give one, or numbers without +")
    if not _is_number(values[0]):
        close = difflib.get_close_matches(preset, _PRESETS, 1)
        known = f"did you mean {close[0]}{plus}{more}?" if close else f"use numbers or {', '.join(_PRESETS)}"
        raise ValueError(f"{name}: there is no curve {value!r}; {known}")
    weights = [read_number(name, each) for each in values]
    if len(weights) > count:
        raise ValueError(f"{name}: {len(weights)} values for {count} blocks, give {count}")
    return weights


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


_OF_BLOCKS: Mapping[str, Callable[[str, Any], float]] = {
    "block_dims": read_whole_number,
    "block_alphas": read_number,
    "conv_block_dims": read_whole_number,
    "conv_block_alphas": read_number,
}
_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "dropout": read_chance,
    "rank_dropout": read_chance,
    "module_dropout": read_chance,
    "conv_dim": read_whole_number,
    "conv_alpha": read_number,
    "block_lr_zero_threshold": read_number,
    "loraplus_lr_ratio": _ratio,
    "loraplus_unet_lr_ratio": _ratio,
    "loraplus_text_encoder_lr_ratio": _ratio,
    "dora_wd": read_switch,
    "wd_on_output": read_switch,
    "train_norm": _starts_of_norms,
}
_OF_PART: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"conv_dim", "conv_alpha", "block_lr_zero_threshold", "loraplus_unet_lr_ratio"})
    | {*_OF_BLOCKS, *_WEIGHTS_OF_HALVES},
    "text_encoder": frozenset({"loraplus_text_encoder_lr_ratio"}),
}
# What has no effect unless one of the others is given, and what these would say.
_NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "conv_alpha": (("conv_dim", "conv_block_dims"), "a rank above 0 of the convolutions"),
    "block_alphas": (("block_dims",), "ranks above 0 of the blocks"),
    "conv_block_alphas": (("conv_block_dims",), "ranks above 0 of the convolutions in the blocks"),
    "wd_on_output": (("dora_wd",), "which makes DoRA if it is True"),
    "block_lr_zero_threshold": (_WEIGHTS_OF_HALVES, "which give blocks learning rates of their own"),
}
# How a weight rises over the blocks, from the first, at 0, to the last, at 1.
_PRESETS: Mapping[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


# The tensors of files.


def read_weights(file: StrPath) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle (.pt, .ckpt) that holds nothing but tensors."""
    if Path(file).suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


_NEEDED = {"lora_down.weight", "lora_up.weight", "alpha"}
_LORA_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
_NORM_PARTS = ("w_norm", "b_norm")


def select_weights(weights_sd: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The part of a LoRA that fits `layers`, with an alpha for every module (the rank where the file has none).

    Logs the modules that are left out. Raises ValueError if nothing fits, or if a shape contradicts the layer's.
    """
    weights_sd = _with_alphas(weights_sd)
    selected: dict[str, Tensor] = {}
    for name, layer in layers.items():
        kinds = _NORM_PARTS if isinstance(layer, NORMS) else _LORA_PARTS
        own = {part: weights_sd[f"{name}.{part}"] for part in kinds if f"{name}.{part}" in weights_sd}
        if own.keys() >= _NEEDED:
            _check_shapes(name, layer, own["lora_down.weight"], own["lora_up.weight"])
        elif "w_norm" not in own:
            continue
        for part in own.keys() - _NEEDED:
            _check_shape(name, layer, part, own[part])
        selected |= {f"{name}.{part}": tensor for part, tensor in own.items()}
    left_out = weights_sd.keys() - selected.keys()
    if not selected:
        names = listing(_lora_names(left_out)) if left_out else "it is empty"
        raise ValueError(f"nothing in this LoRA fits the model: {names}")
    if left_out:
        logger.warning("%d tensors of the LoRA fit no layer and are ignored: %s", len(left_out), listing(left_out))
    return selected


def _check_shapes(name: str, layer: nn.Module, down: Tensor, up: Tensor) -> None:
    out_features, in_features, *kernel = layer.weight.shape
    rank = len(down)
    needed_down, needed_up = (rank, in_features, *kernel), (out_features, rank, *(1 for _ in kernel))
    if down.shape != needed_down or up.shape != needed_up:
        raise ValueError(
            f"{name} is {_shape(down)} and {_shape(up)} in the LoRA, but at rank {rank} the model needs "
            f"{_shape(needed_down)} and {_shape(needed_up)}; the LoRA was made for another kind of model"
        )


def _check_shape(name: str, layer: nn.Module, part: str, tensor: Tensor) -> None:
    """Of a DoRA's magnitudes, or of what is added to a normalisation."""
    if part == "dora_scale":
        ones = (1,) * (layer.weight.dim() - 2)
        needed = [(layer.weight.shape[0], 1, *ones), (1, layer.weight.shape[1], *ones)]
    else:
        values = layer.weight if part == "w_norm" else layer.bias
        needed = [] if values is None else [tuple(values.shape)]
    if tuple(tensor.shape) not in needed:
        shapes = " or ".join(map(_shape, needed)) or "none"
        raise ValueError(
            f"{name}.{part} is {_shape(tensor)} in the LoRA, but the model needs {shapes}; the LoRA was made for "
            "another kind of model"
        )


def _with_alphas(weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    complete = dict(weights_sd)
    for key, down in weights_sd.items():
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            alpha = weights_sd.get(f"{name}.alpha")
            complete[f"{name}.alpha"] = torch.tensor(float(len(down))) if alpha is None else alpha.reshape(())
    return complete


def _dora_class_of(magnitudes: Tensor, weight: Tensor) -> type[DoRAModule]:
    """The class of a weight's module with these magnitudes, whose shape is one of both."""
    return DoRAModule if len(magnitudes) == len(weight) else InputDoRAModule


def _merged_weight(weight: Tensor, parts: Mapping[str, Tensor], multiplier: float) -> Tensor:
    """A weight with a LoRA or DoRA in it, whose tensors these are; all in float32."""
    up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
    scale = parts["alpha"].item() / len(down)
    if "dora_scale" not in parts:
        return weight.flatten(1).addmm(up, down, alpha=multiplier * scale).view(weight.shape)
    magnitudes, summed = parts["dora_scale"], weight.flatten(1).addmm(up, down, alpha=scale).view(weight.shape)
    norms = _weight_norms(summed, _dora_class_of(magnitudes, weight).axis)
    turned = summed * (magnitudes / norms.clamp_min(_SMALLEST_NORM))
    return weight.lerp(turned, multiplier)


def _sort_metadata(file: Path) -> None:
    """Rewrites the header with its metadata sorted (safetensors orders it randomly) and puts the file on the disk."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) != size:
            raise RuntimeError(f"{file}: its sorted header does not fit in the place of the unsorted one")
        stream.seek(8)
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _shape(tensor: Tensor | tuple[int, ...]) -> str:
    return "x".join(map(str, tensor.shape if isinstance(tensor, Tensor) else tensor)) or "scalar"


def listing(names: Collection[str], limit: int = 10) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# The network.


class LoRANetwork(nn.Module):
    """All branches of a model, registered under their names: `state_dict()` has exactly the keys of a LoRA file."""

    module_class = LoRAModule
    known_arguments: ClassVar[frozenset[str]] = ARGUMENTS
    """Names of the arguments that this kind of network reads."""
    trains_by_chance: ClassVar[bool] = False
    """Whether chance decides what of each branch a step trains."""

    def __init__(
        self,
        loras: Iterable[LoRAModule | NormModule],
        multiplier: float = 1.0,
        spellings: Mapping[str, str] | None = None,
        arguments: NetworkArguments | None = None,
    ) -> None:
        """`spellings`: beginnings of names that a file may have for the model -> those of this network. Of the
        arguments only the learning rates still count.
        """
        super().__init__()
        self.spellings = dict(spellings or {})
        self.arguments = arguments or NetworkArguments()
        for remark in self.arguments.remarks:
            logger.warning("%s", remark)
        for lora in loras:
            self.add_module(lora.lora_name, lora)
        self.set_multiplier(multiplier)

    @classmethod
    def create(
        cls,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        network_args: Mapping[str, Any],
    ) -> "LoRANetwork":
        """A new network; see `create_network`."""
        spellings = spellings_of(unet)
        arguments = NetworkArguments.read(network_args, cls.known_arguments, sdxl=bool(spellings))
        rank = network_dim or DEFAULT_RANK
        alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
        cls.check_arguments(arguments, rank)
        keywords, module_class = cls.module_keywords(arguments), cls._module_class(arguments.dora_class)
        targets = UNET_TARGETS | (UNET_TARGETS_OF_CONVOLUTIONS if arguments.adapts_convolutions else set())
        layers = find_layers(text_encoder, unet, TEXT_ENCODER_TARGETS, targets)
        loras: list[LoRAModule | NormModule] = []
        for name, layer in layers.items():
            own_rank, own_alpha = arguments.size_of(name, layer, rank, alpha)
            if own_rank and not arguments.leaves_out(name):
                loras.append(module_class(name, layer, multiplier, own_rank, own_alpha, **keywords))
        if not loras and layers:
            raise ValueError("the arguments leave no layer to adapt, since ranks or learning rates of all blocks are 0")
        if not loras:
            raise ValueError("found no attention or feed-forward layer to adapt in the text encoder and the U-Net")
        for name, norm in find_layers(text_encoder, unet, TEXT_ENCODER_TARGETS, targets, NORMS).items():
            block_rank, _ = arguments.size_of(name, norm, rank, alpha)
            if name.startswith(arguments.train_norm) and block_rank and not arguments.leaves_out(name):
                loras.append(NormModule(name, norm, multiplier))
        return cls(loras, multiplier, spellings, arguments)

    @classmethod
    def check(
        cls, rank: int | None, sdxl: bool, trained: Collection[str], network_args: Mapping[str, Any]
    ) -> list[str]:
        """Raises the ValueError for network arguments that `create_network` would raise beside a model. `rank` None is
        that of a file. `trained`: which of PARTS are. Returns what is probably not meant, a sentence each.
        """
        arguments = NetworkArguments.read(network_args, cls.known_arguments, sdxl)
        cls.module_keywords(arguments)
        if rank is not None:
            cls.check_arguments(arguments, rank)
        idle = {part: _without_effect(network_args, part) for part in PARTS if part not in trained}
        said = [f"{', '.join(names)}: no effect, {PARTS[part]} is not trained" for part, names in idle.items() if names]
        return [*arguments.remarks, *said]

    @classmethod
    def check_arguments(cls, arguments: NetworkArguments, rank: int) -> None:
        """For relatives: ValueError for arguments that a new network of this rank cannot have."""

    @classmethod
    def module_keywords(cls, arguments: NetworkArguments) -> dict[str, Any]:
        """What every module of a network with these arguments is made with."""
        return {name: getattr(arguments, name) for name in ("dropout", "rank_dropout", "module_dropout")}

    @classmethod
    def _module_class(cls, dora_class: type[DoRAModule] | None) -> type[LoRAModule]:
        if dora_class is not None and cls.module_class is not LoRAModule:
            raise ValueError("DoRA (dora_wd) is trained by networks.lora alone")
        return dora_class or cls.module_class

    @classmethod
    def from_weights(
        cls,
        multiplier: float,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        network_args: Mapping[str, Any],
    ) -> tuple["LoRANetwork", dict[str, Tensor]]:
        """A network like the one these weights are of; see `create_network_from_weights`."""
        layers = find_layers(text_encoder, unet, kinds=LAYERS | NORMS)
        spellings = spellings_of(unet)
        arguments = NetworkArguments.read(network_args, cls.known_arguments, sdxl=bool(spellings))
        keywords = cls.module_keywords(arguments)
        weights_sd = select_weights(respelled(weights_sd, spellings), layers)
        loras: list[LoRAModule | NormModule] = []
        for name in _lora_names(weights_sd):
            if f"{name}.w_norm" in weights_sd:
                loras.append(NormModule(name, layers[name], multiplier))
                continue
            magnitudes = weights_sd.get(f"{name}.dora_scale")
            dora_class = None if magnitudes is None else _dora_class_of(magnitudes, layers[name].weight)
            module_class = cls._module_class(dora_class)
            rank, alpha = len(weights_sd[f"{name}.lora_down.weight"]), weights_sd[f"{name}.alpha"].item()
            arguments.check_describes(name, layers[name], rank, alpha)
            loras.append(module_class(name, layers[name], multiplier, rank, alpha, **keywords))
        cls._check_content(weights_sd, layers, unet, arguments)
        return cls(loras, multiplier, spellings, arguments), weights_sd

    @classmethod
    def _check_content(
        cls,
        weights_sd: Mapping[str, Tensor],
        layers: Mapping[str, nn.Module],
        unet: nn.Module | None,
        arguments: NetworkArguments,
    ) -> None:
        """ValueError if a network of these weights is none of this kind, or has nothing of what arguments ask for."""
        parts = {key.partition(".")[2] for key in weights_sd}
        names = [name for name in _lora_names(weights_sd) if f"{name}.lora_down.weight" in weights_sd]
        if "w_norm" in parts and "train_norm" not in cls.known_arguments:
            raise ValueError("these weights train normalisations (w_norm), too, which this kind of network does not")
        ranks = (arguments.conv_dim or 0, *(arguments.conv_block_dims or ()))
        if any(ranks):
            convolutions, kind = {name for name in names if _is_large(layers[name])}, "3x3 convolutions"
        else:
            convolutions = find_layers(None, unet, unet_targets=UNET_TARGETS_OF_CONVOLUTIONS).keys() & names
            kind = "layers of ResNet blocks and samplers"
        of_convolutions = "conv_block_dims" if arguments.conv_dim is None else "conv_dim"
        for wanted, argument, found, what in (
            (arguments.dora_wd, "dora_wd", "dora_scale" in parts, "dora_scale"),
            (arguments.train_norm, "train_norm", "w_norm" in parts, "w_norm"),
            (arguments.adapts_convolutions, of_convolutions, convolutions, kind),
        ):
            if wanted and not found:
                raise ValueError(f"{argument}: these weights have no {what}, and a network is made as they are")

    @property
    def text_encoder_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.children() if not lora.lora_name.startswith(UNET_PREFIX)]

    @property
    def unet_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.children() if lora.lora_name.startswith(UNET_PREFIX)]

    def branches(self) -> list[LoRAModule]:
        """What stands beside layers that are no normalisations."""
        return [lora for lora in self.children() if not isinstance(lora, NormModule)]

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the whole network from the next forward on; 0 leaves the model's own output, bit for bit."""
        self.multiplier = multiplier
        for lora in self.children():
            lora.multiplier = multiplier

    def apply_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attaches the branches to the layers of these modules; the branches of a part that is left out are dropped."""
        dropped = ([] if apply_text_encoder else self.text_encoder_loras) + ([] if apply_unet else self.unet_loras)
        for lora in dropped:
            delattr(self, lora.lora_name)
        layers = find_layers(text_encoder, unet, kinds=LAYERS | NORMS)
        missing = [lora.lora_name for lora in self.children() if lora.lora_name not in layers]
        if missing:
            raise ValueError(f"the model has no layer for {listing(missing)}")
        for lora in self.children():
            lora.apply_to(layers[lora.lora_name])

    def is_mergeable(self) -> bool:
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Adds `weights_sd` at the present multiplier to the model's own weights, instead of `apply_to`.

        Sums are made in float32 on `device` (the weight's own by default) and rounded once, through `dtype` if given;
        the weights keep their dtype, device and memory. Raises ValueError as `create_network_from_weights` does.
        """
        layers = find_layers(text_encoder, unet, kinds=LAYERS | NORMS)
        weights_sd = select_weights(respelled(weights_sd, spellings_of(unet)), layers)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights_sd.items():
            name, _, part = key.partition(".")
            parts.setdefault(name, {})[part] = tensor
        for name, own in parts.items():
            layer = layers[name]
            device_of_sum = layer.weight.device if device is None else device
            own = {part: tensor.to(device_of_sum, torch.float32) for part, tensor in own.items()}
            merged = {"weight": layer.weight.to(device_of_sum, torch.float32)}
            if "w_norm" in own:
                merged["weight"] = merged["weight"] + self.multiplier * own["w_norm"]
                if "b_norm" in own:
                    merged["bias"] = layer.bias.to(device_of_sum, torch.float32) + self.multiplier * own["b_norm"]
            else:
                merged["weight"] = _merged_weight(merged["weight"], own, self.multiplier)
            for kind, values in merged.items():
                parameter = getattr(layer, kind)
                parameter.copy_(values.to(dtype or parameter.dtype))

    def own_weights(self, weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA file's tensors under this network's names, with an alpha for every module (the rank where the file
        has none). Raises ValueError if two of them get the same name.
        """
        return _with_alphas(respelled(weights_sd, self.spellings))

    def load_weights(self, file: StrPath) -> None:
        """Loads a LoRA file into the network. Raises ValueError if it does not fit; a partial fit is logged."""
        weights_sd = self.own_weights(read_weights(file))
        own = self.state_dict()
        shared = own.keys() & weights_sd.keys()
        if not shared:
            raise ValueError(f"{file}: none of its {len(weights_sd)} tensors belongs to this network")
        for key in sorted(shared):
            if weights_sd[key].shape != own[key].shape:
                found, needed = _shape(weights_sd[key]), _shape(own[key])
                raise ValueError(f"{file}: {key} is {found}, but this network, at its rank, needs {needed}")
        for name in _lora_names(shared):
            decomposed = f"{name}.dora_scale" in weights_sd
            if decomposed != (f"{name}.dora_scale" in own):
                kinds = ("a DoRA", "a plain LoRA") if decomposed else ("a plain LoRA", "a DoRA")
                raise ValueError(
                    f"{file} is {kinds[0]} and this network {kinds[1]}: create it with dora_wd={decomposed}, or from "
                    "the file"
                )
        if absent := own.keys() - shared:
            logger.warning("%s has nothing for %s: left as they are", file, listing(_lora_names(absent)))
        if unknown := weights_sd.keys() - shared:
            logger.warning("%s: ignored, the network has no such module: %s", file, listing(_lora_names(unknown)))
        self.load_state_dict({key: weights_sd[key] for key in shared}, strict=False)

    def save_weights(
        self, file: StrPath, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the network to `file`: .safetensors, or with any other ending a pickle, which holds no metadata.

        The same weights and metadata give the same bytes. What stood at `file` is replaced only by a complete new file.
        Magnitudes of DoRA keep their dtype: rounding one changes a whole row of a weight.
        """
        file = Path(file)
        tensors = {
            key: tensor.detach().to("cpu", None if key.endswith(".dora_scale") else dtype).contiguous()
            for key, tensor in self.state_dict().items()
        }
        unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            if file.suffix == ".safetensors":
                save_file(tensors, unfinished, dict(metadata or {}))
                _sort_metadata(unfinished)
            else:
                torch.save(tensors, unfinished)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and their names. A rate of None means `default_lr`; a part whose rate is 0 gets no group."""
        return self.prepare_optimizer_params_with_multiple_te_lrs([text_encoder_lr], unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lrs: Sequence[float | None] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """As `prepare_optimizer_params`, with a rate for each text encoder; the last one counts for all further ones.

        The groups are called text_encoder or, with several, text_encoder_1, text_encoder_2 ..., and unet or, where the
        blocks have rates of their own, unet_block_00, unet_block_01 ...; what LoRA+ moves faster ends with _plus.
        """
        rates = list(text_encoder_lrs or [None])
        encoders: dict[str, list[LoRAModule]] = {}
        for lora in self.text_encoder_loras:
            number = lora.lora_name.removeprefix(TEXT_ENCODER_PREFIX).partition("_")[0]
            encoders.setdefault(number, []).append(lora)
        groups: dict[str, dict[str, Any]] = {}
        for number, loras in encoders.items():
            lr = rates[min(int(number or 1), len(rates)) - 1]
            name = f"text_encoder_{number}" if number else "text_encoder"
            ratio = self.arguments.plus_ratio("text_encoder")
            groups |= _optimizer_groups(name, loras, default_lr if lr is None else lr, ratio)
        unet_lr, ratio = default_lr if unet_lr is None else unet_lr, self.arguments.plus_ratio("unet")
        for block, loras in self._unet_loras_by_block().items():
            name = "unet" if block is None else f"unet_block_{block:02d}"
            groups |= _optimizer_groups(name, loras, unet_lr * self.arguments.rate_of(block), ratio)
        return list(groups.values()), list(groups)

    def _unet_loras_by_block(self) -> dict[int | None, list[LoRAModule]]:
        """The U-Net's branches by their block, in order; all under None if blocks have no rates of their own."""
        blocks: dict[int | None, list[LoRAModule]] = {}
        for lora in self.unet_loras:
            block = None if self.arguments.block_weights is None else unet_block(lora.lora_name)
            blocks.setdefault(block, []).append(lora)
        return dict(sorted(blocks.items(), key=lambda item: -1 if item[0] is None else item[0]))

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales every branch's alpha / rank * up @ down whose norm is above `max_norm` down to it; a rounding's width
        below it, 0.8 % in bf16, lest rounding leaves it above. Magnitudes of DoRA, what is added to normalisations and
        branches that ask for no gradients stay as they are.

        Returns how many were, and the mean and the largest norm of what may be afterwards, as tensors on `device`.
        """
        loras = [lora for lora in self.branches() if any(parameter.requires_grad for parameter in lora.parameters())]
        norms = torch.stack([lora.weight_norm() for lora in loras]) if loras else torch.zeros(1)
        aim = max_norm * (1 - torch.finfo(next(self.parameters()).dtype).eps)
        ratios = torch.where(norms > max_norm, aim / norms, 1.0)
        for lora, ratio in zip(loras, ratios.unbind(), strict=True):
            lora.scale_down(ratio)
        norms = norms * ratios
        return tuple(value.to(device) for value in ((ratios < 1).sum(), norms.mean(), norms.max()))

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        return self.parameters()

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        self.train()

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the model's own checkpointing runs the branches along with its layers."""


def _optimizer_groups(
    name: str, loras: Iterable[LoRAModule], lr: float, plus_ratio: float | None
) -> dict[str, dict[str, Any]]:
    """The optimizer's groups of these branches by name: one, or with LoRA+ two. Without a rate there is none."""
    slow, fast = [], []
    for lora in loras:
        for key, parameter in lora.named_parameters():
            if parameter.requires_grad:
                is_fast = plus_ratio is not None and key.startswith(getattr(lora, "plus_parameters", ()))
                (fast if is_fast else slow).append(parameter)
    groups = {name: {"params": slow, "lr": lr}, f"{name}_plus": {"params": fast, "lr": lr * (plus_ratio or 0)}}
    return {name: group for name, group in groups.items() if group["params"] and group["lr"]}


def network_functions(kind: type[LoRANetwork]) -> tuple[Callable[..., Any], ...]:
    """The functions of a module for this kind of network: `create_network`, `create_network_from_weights` and
    `check_network_args`.
    """

    def create_network(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> LoRANetwork:
        """A new network for the attention and feed-forward layers of these modules, in float32 on the default device.

        `network_dim` None is rank 4, `network_alpha` None is 1 and 0 is the rank. The network arguments are texts or
        numbers, and several values are separated by commas; see `NetworkArguments`. With `conv_dim` or
        `conv_block_dims` ResNet blocks and samplers have branches, too: large kernels of these ranks, all else as in
        attention blocks. `dropout` wins over `neuron_dropout`. `dora_wd` True makes DoRA. `train_norm` True trains the
        normalisations within and beside the adapted blocks, too, "unet" or "text_encoder" those of one part. Raises
        ValueError for an argument this network does not know, and for wrong values.
        """
        arguments = {"dropout": neuron_dropout, **{k: v for k, v in network_args.items() if v is not None}}
        return kind.create(multiplier, network_dim, network_alpha, text_encoder, unet, arguments)

    def create_network_from_weights(
        multiplier: float,
        file: StrPath | None,
        vae: nn.Module | None,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **network_args: Any,
    ) -> tuple[LoRANetwork, dict[str, Tensor]]:
        """A network with the modules, ranks and alphas of a LoRA file, or of `weights_sd`, which is then used instead.

        Returns it with the weights that belong to it, under its own names; they are not loaded yet: `apply_to`, then
        `load_state_dict`. Keys that fit no layer are logged and left out. `for_inference` makes a frozen network in
        evaluation mode. Raises ValueError if nothing fits or a shape is that of another kind of model.
        """
        weights_sd = read_weights(file) if weights_sd is None else weights_sd
        network, weights_sd = kind.from_weights(multiplier, text_encoder, unet, weights_sd, network_args)
        if for_inference:
            network.eval().requires_grad_(False)
        elif not network.branches():
            raise ValueError("these weights have normalisations alone, which are trained beside other layers only")
        return network, weights_sd

    def check_network_args(
        rank: int | None, sdxl: bool, trained: Collection[str] = PARTS, /, **network_args: Any
    ) -> list[str]:
        """See `LoRANetwork.check`."""
        return kind.check(rank, sdxl, trained, network_args)

    return create_network, create_network_from_weights, check_network_args


create_network, create_network_from_weights, check_network_args = network_functions(LoRANetwork)
