"""LoRA for the U-Net and the text encoders of Stable Diffusion (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Each adapted layer computes ``W x + multiplier * alpha / rank * up(down(x))``; only ``down`` and ``up`` are trained.

This file stands alone: copied out of the project it needs torch and safetensors, and works on the modules of a
Diffusers pipeline. A layer is named by its path in the model, dots turned into underscores, after ``lora_unet_``,
``lora_te_`` or, with two text encoders, ``lora_te1_`` and ``lora_te2_``. The U-Net of SDXL is the exception: its names
are those of the original layout, whether the U-Net is handed in as Diffusers builds it or as a tree with these names.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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
# A new network adapts the layers inside modules of these classes; one made from a file adapts whatever the file names.
TEXT_ENCODER_TARGETS = frozenset({"CLIPAttention", "CLIPMLP"})
UNET_TARGETS = frozenset({"Transformer2DModel"})


class LoRAModule(nn.Module):
    """The low-rank branch of one Linear or Conv2d layer.

    `lora_down` keeps a convolution's kernel, stride and padding; `lora_up` is then 1x1. `alpha` None or 0 means the
    rank. A new branch adds nothing, because `lora_up` starts at zero.
    """

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = DEFAULT_RANK,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.multiplier = multiplier
        self.lora_dim = lora_dim
        self.dropout = dropout
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
        hidden = self.lora_down(branch_input)
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self._add_branch(base, hidden, scale)

    def _add_branch(self, base: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """base + scale * up(hidden), with one temporary of the output's size less than the formula where possible."""
        up = self.lora_up.weight
        if up.dim() == 2 and hidden.dtype == base.dtype:
            rows = base.reshape(-1, base.shape[-1])
            return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), up.t(), alpha=scale).view(base.shape)
        return base + self.lora_up(hidden * scale).to(base.dtype)


class LoRANetwork(nn.Module):
    """All branches of a model, registered under their names: `state_dict()` has exactly the keys of a LoRA file."""

    def __init__(
        self, loras: Iterable[LoRAModule], multiplier: float = 1.0, spellings: Mapping[str, str] | None = None
    ) -> None:
        """`spellings`: beginnings of names that a file may have for the model -> those of this network."""
        super().__init__()
        self.spellings = dict(spellings or {})
        for lora in loras:
            self.add_module(lora.lora_name, lora)
        self.set_multiplier(multiplier)

    @property
    def text_encoder_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.children() if not lora.lora_name.startswith(UNET_PREFIX)]

    @property
    def unet_loras(self) -> list[LoRAModule]:
        return [lora for lora in self.children() if lora.lora_name.startswith(UNET_PREFIX)]

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
        layers = find_layers(text_encoder, unet)
        missing = [lora.lora_name for lora in self.children() if lora.lora_name not in layers]
        if missing:
            raise ValueError(f"the model has no layer for {_listing(missing)}")
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
        layers = find_layers(text_encoder, unet)
        weights_sd = select_weights(_respelled(weights_sd, _sdxl_spellings(unet)), layers)
        for name in _lora_names(weights_sd):
            weight = layers[name].weight
            device_of_sum = weight.device if device is None else device
            down, up = (
                weights_sd[f"{name}.{part}.weight"].flatten(1).to(device_of_sum, torch.float32)
                for part in ("lora_down", "lora_up")
            )
            scale = self.multiplier * weights_sd[f"{name}.alpha"].item() / len(down)
            merged = weight.flatten(1).to(device_of_sum, torch.float32).addmm(up, down, alpha=scale)
            weight.copy_(merged.view(weight.shape).to(dtype or weight.dtype))

    def own_weights(self, weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A LoRA file's tensors under this network's names, with an alpha for every module (the rank where the file
        has none). Raises ValueError if two of them get the same name.
        """
        return _with_alphas(_respelled(weights_sd, self.spellings))

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
        if absent := own.keys() - shared:
            logger.warning("%s has nothing for %s: left as they are", file, _listing(_lora_names(absent)))
        if unknown := weights_sd.keys() - shared:
            logger.warning("%s: ignored, the network has no such module: %s", file, _listing(_lora_names(unknown)))
        self.load_state_dict({key: weights_sd[key] for key in shared}, strict=False)

    def save_weights(
        self, file: StrPath, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the network to `file`: .safetensors, or with any other ending a pickle, which holds no metadata.

        The same weights and metadata give the same bytes. What stood at `file` is replaced only by a complete new file.
        """
        file = Path(file)
        tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in self.state_dict().items()}
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

        The groups are called text_encoder or, with several, text_encoder_1, text_encoder_2 ..., and unet.
        """
        rates = list(text_encoder_lrs or [None])
        encoders: dict[str, list[LoRAModule]] = {}
        for lora in self.text_encoder_loras:
            number = lora.lora_name.removeprefix(TEXT_ENCODER_PREFIX).partition("_")[0]
            encoders.setdefault(number, []).append(lora)
        parts = []
        for number, loras in encoders.items():
            index = int(number or 1) - 1
            name = f"text_encoder_{number}" if number else "text_encoder"
            parts.append((name, loras, rates[min(index, len(rates) - 1)]))
        parts.append(("unet", self.unet_loras, unet_lr))
        groups, names = [], []
        for name, loras, lr in parts:
            lr = default_lr if lr is None else lr
            if loras and lr:
                groups.append({"params": [p for lora in loras for p in lora.parameters()], "lr": lr})
                names.append(name)
        return groups, names

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales every branch's alpha / rank * up @ down whose norm is above `max_norm` down to it, both factors alike;
        a rounding's width below it, 0.8 % in bf16, lest rounding leaves it above.

        Returns how many were, and the mean and the largest norm afterwards, as tensors on `device`.
        """
        loras = list(self.children())
        norms = torch.stack([lora.weight_norm() for lora in loras])
        aim = max_norm * (1 - torch.finfo(loras[0].lora_up.weight.dtype).eps)
        ratios = torch.where(norms > max_norm, aim / norms, 1.0)
        for lora, factor in zip(loras, ratios.sqrt().unbind(), strict=True):
            for weight in lora.parameters():
                weight.copy_(weight.float() * factor)
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

    `network_dim` None is rank 4, `network_alpha` None is 1 and 0 is the rank. `dropout` among the network arguments
    wins over `neuron_dropout`: the chance of each of the rank's values to be zeroed while training. Raises ValueError
    for an argument this network does not know.
    """
    dropout = _dropout(network_args, neuron_dropout)
    rank = network_dim or DEFAULT_RANK
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    layers = find_layers(text_encoder, unet, TEXT_ENCODER_TARGETS, UNET_TARGETS)
    loras = [
        LoRAModule(name, layer, multiplier, rank, alpha, dropout)
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    ]
    if not loras:
        raise ValueError("found no attention or feed-forward layer to adapt in the text encoder and the U-Net")
    return LoRANetwork(loras, multiplier, _sdxl_spellings(unet))


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
    dropout = _dropout(network_args, None)
    layers = find_layers(text_encoder, unet)
    spellings = _sdxl_spellings(unet)
    weights_sd = _respelled(read_weights(file) if weights_sd is None else weights_sd, spellings)
    weights_sd = select_weights(weights_sd, layers)
    loras = [
        LoRAModule(
            name,
            layers[name],
            multiplier,
            len(weights_sd[f"{name}.lora_down.weight"]),
            weights_sd[f"{name}.alpha"].item(),
            dropout,
        )
        for name in _lora_names(weights_sd)
    ]
    network = LoRANetwork(loras, multiplier, spellings)
    if for_inference:
        network.eval().requires_grad_(False)
    return network, weights_sd


def find_layers(
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    text_encoder_targets: Collection[str] | None = None,
    unet_targets: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers by LoRA name: all of them, or those inside modules of the target classes."""
    layers: dict[str, nn.Module] = {}
    several = isinstance(text_encoder, Sequence | nn.ModuleList)
    encoders = list(text_encoder) if several else [text_encoder]
    for number, encoder in enumerate(encoders, start=1):
        if encoder is not None:
            prefix = f"{TEXT_ENCODER_PREFIX}{number}_" if len(encoders) > 1 else f"{TEXT_ENCODER_PREFIX}_"
            # transformers 5 took the text_model level out of CLIPTextModel; in LoRA files it is part of the name.
            if not any(name == "text_model" for name, _ in encoder.named_children()):
                prefix += "text_model_"
            layers |= _layers_within(encoder, prefix, text_encoder_targets)
    if unet is not None:
        layers |= _respelled(_layers_within(unet, f"{UNET_PREFIX}_", unet_targets), _sdxl_spellings(unet))
    return layers


def _layers_within(root: nn.Module, prefix: str, targets: Collection[str] | None) -> dict[str, nn.Module]:
    if targets is None:
        scopes = [("", root)]
    else:
        scopes = [(path, module) for path, module in root.named_modules() if type(module).__name__ in targets]
    return {
        prefix + path.replace(".", "_"): layer
        for scope_path, scope in scopes
        for path, layer in scope.named_modules(prefix=scope_path)
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


# The original layout's names for the U-Net of SDXL, whose blocks it numbers through all levels.
_SDXL_ENDS = (
    ("conv_in", "input_blocks_0_0"),
    ("time_embedding_linear_1", "time_embed_0"),
    ("time_embedding_linear_2", "time_embed_2"),
    ("add_embedding_linear_1", "label_emb_0_0"),
    ("add_embedding_linear_2", "label_emb_0_2"),
    ("conv_out", "out_2"),
)
_SDXL_RESNET = (
    ("conv1", "in_layers_2"),
    ("time_emb_proj", "emb_layers_1"),
    ("conv2", "out_layers_3"),
    ("conv_shortcut", "skip_connection"),
)


def _sdxl_spellings(unet: nn.Module | None) -> dict[str, str]:
    """How Diffusers' names begin -> how the original ones do, for an SDXL U-Net with either; {} for other models."""
    if not hasattr(unet, "add_embedding") and not hasattr(unet, "input_blocks"):
        return {}
    resnets = [("mid_block_resnets_0", "middle_block_0"), ("mid_block_resnets_1", "middle_block_2")]
    parts = [*_SDXL_ENDS, ("mid_block_attentions_0", "middle_block_1")]
    for half, blocks, number in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for index, (attentions, has_sampler) in enumerate(_sdxl_levels(unet, half)):
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


def _sdxl_levels(unet: nn.Module, half: str) -> list[tuple[list[bool], bool]]:
    """The levels of a half, "down" or "up": whether each of its ResNets has an attention, whether a sampler ends it."""
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


def _respelled(by_key: Mapping[str, T], spellings: Mapping[str, str]) -> dict[str, T]:
    """`by_key` with the network's layer names. Its keys are names alone, or those of a file: <name>.<tensor>."""
    respelled: dict[str, T] = {}
    for key, value in by_key.items():
        name, dot, part = key.partition(".")
        head = name
        while head and head not in spellings:
            head = head.rpartition("_")[0]
        own_name = spellings[head] + name[len(head) :] if head else name
        own_key = own_name + dot + part
        if own_key in respelled:
            raise ValueError(f"the LoRA has two tensors for {own_key}, under the names of two layouts")
        respelled[own_key] = value
    return respelled


def read_weights(file: StrPath) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle (.pt, .ckpt) that holds nothing but tensors."""
    if Path(file).suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def select_weights(weights_sd: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The part of a LoRA that fits `layers`, with an alpha for every module (the rank where the file has none).

    Logs the modules that are left out. Raises ValueError if nothing fits, or if a shape contradicts the layer's.
    """
    weights_sd = _with_alphas(weights_sd)
    selected: dict[str, Tensor] = {}
    for name, layer in layers.items():
        keys = f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
        if all(key in weights_sd for key in keys):
            _check_shapes(name, layer, weights_sd[keys[0]], weights_sd[keys[1]])
            selected |= {key: weights_sd[key] for key in keys}
    left_out = weights_sd.keys() - selected.keys()
    if not selected:
        names = _listing(_lora_names(left_out)) if left_out else "it is empty"
        raise ValueError(f"nothing in this LoRA fits the model: {names}")
    if left_out:
        logger.warning("%d tensors of the LoRA fit no layer and are ignored: %s", len(left_out), _listing(left_out))
    return selected


def fitting_weights(
    weights_sd: Mapping[str, Tensor], text_encoder: TextEncoders, unet: nn.Module | None
) -> dict[str, Tensor]:
    """`select_weights` for any layer of these modules, whichever names the LoRA has for them."""
    return select_weights(_respelled(weights_sd, _sdxl_spellings(unet)), find_layers(text_encoder, unet))


def _check_shapes(name: str, layer: nn.Module, down: Tensor, up: Tensor) -> None:
    out_features, in_features, *kernel = layer.weight.shape
    rank = len(down)
    needed_down, needed_up = (rank, in_features, *kernel), (out_features, rank, *(1 for _ in kernel))
    if down.shape != needed_down or up.shape != needed_up:
        raise ValueError(
            f"{name} is {_shape(down)} and {_shape(up)} in the LoRA, but at rank {rank} the model needs "
            f"{_shape(needed_down)} and {_shape(needed_up)}; the LoRA was made for another kind of model"
        )


def _with_alphas(weights_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    complete = dict(weights_sd)
    for key, down in weights_sd.items():
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            alpha = weights_sd.get(f"{name}.alpha")
            complete[f"{name}.alpha"] = torch.tensor(float(len(down))) if alpha is None else alpha.reshape(())
    return complete


def _dropout(network_args: dict[str, Any], default: float | None) -> float:
    """The one network argument there is, as a number; from a command line it comes as text."""
    unknown = sorted(network_args.keys() - {"dropout"})
    if unknown:
        raise ValueError(f"unknown network argument {', '.join(unknown)}; this network knows: dropout")
    text = network_args.get("dropout")
    try:
        dropout = float((default if text is None else text) or 0)
    except ValueError:
        dropout = math.nan
    if not 0 <= dropout < 1:
        raise ValueError(f"the network's dropout must be at least 0 and below 1, not {text or default!r}")
    return dropout


def _lora_names(keys: Iterable[str]) -> list[str]:
    """Module names of these keys, each once, in order."""
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _listing(names: Collection[str], limit: int = 10) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shape(tensor: Tensor | tuple[int, ...]) -> str:
    return "x".join(map(str, tensor.shape if isinstance(tensor, Tensor) else tensor)) or "scalar"


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
