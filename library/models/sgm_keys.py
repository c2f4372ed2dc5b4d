"""Names of Stable Diffusion's tensors: the original (CompVis, later "SGM") layout <-> Diffusers and transformers.

One table of pairs per network, used in both directions. The tables are generated from the architecture, so any number
of levels and layers is covered.

Layouts: the reference implementations at github.com/CompVis/stable-diffusion (`ldm.modules.diffusionmodules`),
github.com/Stability-AI/generative-models and github.com/mlfoundations/open_clip (`open_clip.transformer`), and the
module names of `diffusers.UNet2DConditionModel`, `diffusers.AutoencoderKL` and `transformers.CLIPTextModel`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.errors import UserError
from library.models.files.weights_file import WeightsFile

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."  # SD 1.x
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # SD 2.x
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer.text_model."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
# Empty tensors that say what a model predicts, which ComfyUI and others look for.
V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER = "v_pred", "ztsnr"

Shapes = Mapping[str, tuple[int, ...]]
Pairs = Iterable[tuple[str, str]]

_UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
_OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
    # one tensor in the original: queries, keys and values, one below the other
    *((f"attn.in_proj_{kind}", f"self_attn.{part}_proj.{kind}") for kind in ("weight", "bias") for part in "qkv"),
)
# Two other spellings that programs have left in original files: the VAE's attention under the names Diffusers used
# before and after version 0.15, and text encoders without the `text_model` level.
_VAE_SPELLINGS = {
    "group_norm": "norm",
    "query": "q",
    "to_q": "q",
    "key": "k",
    "to_k": "k",
    "value": "v",
    "to_v": "v",
    "proj_attn": "proj_out",
    "to_out.0": "proj_out",
}
_VAE_SPELLING = re.compile(rf"({re.escape(VAE_PREFIX)}(?:en|de)coder\.mid\.attn_1\.)(.+)(\.\w+)")
_CLIP_SPELLING = re.compile(r"cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")

# Tensors that no module uses: schedule tables, buffers that are computed anew, CLIP's unused outputs, markers. They are
# kept and written back. Averaged copies of the weights and parts of training losses are left out.
_CARRIED = re.compile(
    rf"({V_PREDICTION_MARKER}|{ZERO_TERMINAL_SNR_MARKER}"
    r"|betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|logvar|lvlb_weights|scale_factor|denoiser\.(log_)?sigmas"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_model\.embeddings\.position_ids"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?(text_projection(\.weight)?|logit_scale)"
    r"|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)"
    r"|conditioner\.embedders\.1\.model\.(logit_scale|attn_mask))"
)
_DROPPED = ("model_ema.", "first_stage_model.loss.")


class Place(NamedTuple):
    """One tensor of an original file and what of a module it holds."""

    key: str
    """Its full name in the file."""
    names: tuple[str, ...]
    """The module's tensors: one, or several one after the other along the first dimension."""
    turned: bool = False
    """Whether it is the transpose of the module's."""
    convolved: bool = False
    """Whether it is the weight of a 1x1 convolution where the module has a linear layer."""

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Its shape, for the shapes of the module's tensors."""
        first = tuple(shapes[self.names[0]])
        if self.turned:
            return first[::-1]
        rows = sum(shapes[name][0] for name in self.names) if len(self.names) > 1 else None
        joined = first if rows is None else (rows, *first[1:])
        return (*joined, 1, 1) if self.convolved else joined

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The file's tensor, made of the module's."""
        parts = [tensors[name] for name in self.names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.turned:
            return tensor.T
        return tensor[..., None, None] if self.convolved else tensor

    def divide(self, tensor: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The module's tensors, made of the file's; several have memory of their own each."""
        if self.turned:
            tensor = tensor.T.contiguous()
        if len(self.names) == 1:
            return {self.names[0]: tensor.reshape(tuple(shapes[self.names[0]]))}
        parts = tensor.split([shapes[name][0] for name in self.names])
        return {name: part.clone() for name, part in zip(self.names, parts, strict=True)}


class KeyMap:
    """The names of one network's tensors in an original file and in its module.

    `pairs` are (original, module's) names of submodules or of single tensors; everything below a submodule is called
    the same on both sides. Several tensors of the module with one original name are parts of it, in this order.
    `convolved` are the submodules (module's name) that are linear here and 1x1 convolutions in the original, `turned`
    the tensors (module's name) that are transposed there.
    """

    def __init__(self, prefix: str, pairs: Pairs, convolved: Iterable[str] = (), turned: Iterable[str] = ()):
        self.prefix = prefix
        self.pairs = tuple(pairs)
        self._to_original = {ours: original for original, ours in self.pairs}
        self._order = {ours: number for number, (_, ours) in enumerate(self.pairs)}
        self._convolved, self._turned = frozenset(convolved), frozenset(turned)

    def original(self, name: str) -> str:
        """The full name in an original file of the module's tensor `name`. KeyError if there is no such name."""
        head = self._head(name)
        return self.prefix + self._to_original[head] + name[len(head) :]

    def places(self, names: Iterable[str]) -> list[Place]:
        """The tensors of an original file that hold these tensors of the module. KeyError for a name it has not."""
        held: dict[str, list[str]] = {}
        for name in names:
            held.setdefault(self.original(name), []).append(name)
        places = []
        for key, parts in held.items():
            parts.sort(key=lambda name: self._order[self._head(name)])
            module, _, kind = parts[0].rpartition(".")
            convolved = kind == "weight" and module in self._convolved
            places.append(Place(key, tuple(parts), parts[0] in self._turned, convolved))
        return places

    def _head(self, name: str) -> str:
        """The longest leading part of a name that the table has."""
        head = name
        while head not in self._to_original:
            head, dot, _ = head.rpartition(".")
            if not dot:
                raise KeyError(name)
        return head


def usual_spelling(key: str) -> str:
    """The original layout's own name for a key that some program has spelled differently."""
    if match := _VAE_SPELLING.fullmatch(key):
        start, name, parameter = match.groups()
        return f"{start}{_VAE_SPELLINGS.get(name, name)}{parameter}"
    return _CLIP_SPELLING.sub(CLIP_PREFIX, key)


def usual_keys(file: WeightsFile) -> dict[str, str]:
    """The layout's own names of a file's tensors -> the file's. UserError if two of its tensors have one name."""
    names: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118 - a file is no mapping
        name = usual_spelling(key)
        if name in names:
            raise UserError(
                f"{file.path} holds one tensor under two names, {names[name]} and {key}: remove the one that does not "
                "belong to the model"
            )
        names[name] = key
    return names


def usual_shapes(file: WeightsFile) -> dict[str, tuple[int, ...]]:
    """The shapes in a file by the layout's own names. UserError as from `usual_keys`."""
    return {name: file.shape(key) for name, key in usual_keys(file).items()}


def has_all(shapes: Shapes, *starts: str) -> bool:
    """Whether, for each of `starts`, there is a name that begins with it."""
    return all(any(key.startswith(start) for key in shapes) for start in starts)


def is_carried(key: str) -> bool:
    """Whether an original file may hold this tensor that no module uses."""
    return _CARRIED.fullmatch(key) is not None


def is_dropped(key: str) -> bool:
    """Whether this tensor of an original file belongs to its training, not to the model."""
    return key.startswith(_DROPPED)


def _below(original: str, ours: str, table: Pairs) -> list[tuple[str, str]]:
    return [(f"{original}.{a}", f"{ours}.{b}") for a, b in table]


def unet_key_map(config: Mapping[str, Any]) -> KeyMap:
    """The names of a UNet2DConditionModel with this configuration."""
    layers = config["layers_per_block"]
    down, up = config["down_block_types"], config["up_block_types"]
    pairs = [
        ("input_blocks.0.0", "conv_in"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
        *_below("middle_block.0", "mid_block.resnets.0", _UNET_RESNET),
        ("middle_block.1", "mid_block.attentions.0"),
        *_below("middle_block.2", "mid_block.resnets.1", _UNET_RESNET),
    ]
    if config.get("addition_embed_type"):  # SDXL: pooled text and sizes
        pairs += [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    for level, kind in enumerate(down):
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            pairs += _below(f"{block}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            if "CrossAttn" in kind:
                pairs.append((f"{block}.1", f"down_blocks.{level}.attentions.{layer}"))
        if level + 1 < len(down):
            pairs.append(
                (f"input_blocks.{(level + 1) * (layers + 1)}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
            )
    for level, kind in enumerate(up):
        attention = "CrossAttn" in kind
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            pairs += _below(f"{block}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            if attention:
                pairs.append((f"{block}.1", f"up_blocks.{level}.attentions.{layer}"))
        if level + 1 < len(up):
            # the upsampler is the last part of the level's last block, behind the attention if there is one
            pairs.append((f"{block}.{2 if attention else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return KeyMap(UNET_PREFIX, pairs)


def vae_key_map(config: Mapping[str, Any]) -> KeyMap:
    """The names of an AutoencoderKL with this configuration."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [
            (f"{half}.conv_in", f"{half}.conv_in"),
            (f"{half}.norm_out", f"{half}.conv_norm_out"),
            (f"{half}.conv_out", f"{half}.conv_out"),
            *_below(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET),
            *_below(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION),
            *_below(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET),
        ]
    for level in range(levels):
        original, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for layer in range(layers):
            pairs += _below(f"{original}.block.{layer}", f"{ours}.resnets.{layer}", _VAE_RESNET)
        if level + 1 < levels:
            pairs.append((f"{original}.downsample.conv", f"{ours}.downsamplers.0.conv"))
        # the original decoder numbers its levels from the finest, Diffusers in the order they run
        original, ours = f"decoder.up.{levels - 1 - level}", f"decoder.up_blocks.{level}"
        for layer in range(layers + 1):
            pairs += _below(f"{original}.block.{layer}", f"{ours}.resnets.{layer}", _VAE_RESNET)
        if level + 1 < levels:
            pairs.append((f"{original}.upsample.conv", f"{ours}.upsamplers.0.conv"))
    convolved = [ours for _, ours in pairs if ".attentions." in ours and not ours.endswith("group_norm")]
    return KeyMap(VAE_PREFIX, pairs, convolved)


def clip_key_map(prefix: str = CLIP_PREFIX) -> KeyMap:
    """The names of a CLIPTextModel, whose parts are called the same in both layouts."""
    return KeyMap(prefix, [(part, part) for part in ("embeddings", "encoder", "final_layer_norm")])


def open_clip_key_map(prefix: str, layers: int, *, projects: bool = False) -> KeyMap:
    """The names of a CLIPTextModel with so many layers in a file of OpenCLIP's, or, if it `projects`, of a
    CLIPTextModelWithProjection.
    """
    start = "text_model." if projects else ""
    pairs = [
        ("token_embedding", f"{start}embeddings.token_embedding"),
        ("positional_embedding", f"{start}embeddings.position_embedding.weight"),
        ("ln_final", f"{start}final_layer_norm"),
    ]
    for layer in range(layers):
        pairs += _below(f"transformer.resblocks.{layer}", f"{start}encoder.layers.{layer}", _OPEN_CLIP_LAYER)
    projection = "text_projection.weight"
    if projects:
        pairs.append(("text_projection", projection))
    return KeyMap(prefix, pairs, turned=[projection])
