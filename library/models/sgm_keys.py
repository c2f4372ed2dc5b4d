"""Names of Stable Diffusion's tensors: the original (CompVis, later "SGM") layout <-> Diffusers and transformers.

One table of module pairs per network. The tables are generated from the architecture, so any
number of levels and layers is covered. Architectures are read off the tensor shapes of an original file.

Layouts: the reference implementation at github.com/CompVis/stable-diffusion (`ldm.modules.diffusionmodules`) and the
module names of `diffusers.UNet2DConditionModel`, `diffusers.AutoencoderKL`, `transformers.CLIPTextModel`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."

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

# Tensors that no module uses: schedule tables, buffers that are computed anew, CLIP's unused output. They are kept and
# written back. Averaged copies of the weights and parts of training losses are left out.
_CARRIED = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_\w+|logvar|lvlb_weights|scale_factor|denoiser\.(log_)?sigmas"
    r"|cond_stage_model\.transformer\.text_model\.embeddings\.position_ids"
    r"|cond_stage_model\.(transformer\.)?(text_projection(\.weight)?|logit_scale))"
)
_DROPPED = ("model_ema.", "first_stage_model.loss.")


class KeyMap:
    """The names of one network's tensors in an original file and in its module.

    `pairs` are (original, module's) names of submodules; everything below a submodule is called the same on both sides.
    `convolved` are the submodules (module's name) that are linear here and 1x1 convolutions in the original.
    """

    def __init__(self, prefix: str, pairs: Pairs, convolved: Iterable[str] = ()):
        self.prefix = prefix
        self._to_original = {ours: original for original, ours in pairs}
        self._convolved = frozenset(convolved)
        assert len(set(self._to_original.values())) == len(self._to_original), "two submodules share one name"

    def original(self, name: str) -> str:
        """The full name in an original file of the module's tensor `name`. KeyError if there is no such name."""
        head = name
        while head not in self._to_original:  # the longest leading part that is the name of a submodule
            head, dot, _ = head.rpartition(".")
            if not dot:
                raise KeyError(name)
        return self.prefix + self._to_original[head] + name[len(head) :]

    def original_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in an original file of the module's tensor `name`, which has `shape` in the module."""
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in self._convolved:
            return (*shape, 1, 1)
        return tuple(shape)


def usual_spelling(key: str) -> str:
    """The original layout's own name for a key that some program has spelled differently."""
    if match := _VAE_SPELLING.fullmatch(key):
        start, name, parameter = match.groups()
        return f"{start}{_VAE_SPELLINGS.get(name, name)}{parameter}"
    return _CLIP_SPELLING.sub(CLIP_PREFIX, key)


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


def clip_key_map() -> KeyMap:
    """The names of a CLIPTextModel, whose parts are called the same in both layouts."""
    return KeyMap(CLIP_PREFIX, [(part, part) for part in ("embeddings", "encoder", "final_layer_norm")])


def _count(shapes: Shapes, start: str) -> int:
    """How many numbers 0, 1, 2 ... follow `start` in the names."""
    numbers = {key[len(start) :].split(".", 1)[0] for key in shapes if key.startswith(start)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments for UNet2DConditionModel, read off an original file's shapes. KeyError names a tensor that is missing.

    Stable Diffusion 1's U-Net has 8 attention heads whatever its width, which Diffusers calls `attention_head_dim`; the
    number of heads shows in no shape.
    """
    blocks = f"{UNET_PREFIX}input_blocks."
    channels, attention, layers = [], [], [0]
    for index in range(1, _count(shapes, blocks)):
        if f"{blocks}{index}.0.op.weight" in shapes:
            layers.append(0)
            continue
        layers[-1] += 1
        if layers[-1] == 1:
            channels.append(shapes[f"{blocks}{index}.0.out_layers.3.weight"][0])
            attention.append(f"{blocks}{index}.1.norm.weight" in shapes)
    middle = f"{UNET_PREFIX}middle_block.1."
    first = shapes[f"{blocks}0.0.weight"]
    return {
        "in_channels": first[1],
        "out_channels": shapes[f"{UNET_PREFIX}out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": _count(shapes, f"{middle}transformer_blocks."),
        "attention_head_dim": 8,
        "use_linear_projection": len(shapes[f"{middle}proj_in.weight"]) == 2,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments for AutoencoderKL, read off an original file's shapes. KeyError names a tensor that is missing."""
    down = f"{VAE_PREFIX}encoder.down."
    levels = _count(shapes, down)
    return {
        "in_channels": shapes[f"{VAE_PREFIX}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE_PREFIX}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE_PREFIX}decoder.conv_in.weight"][1],
        "block_out_channels": tuple(shapes[f"{down}{level}.block.0.conv1.weight"][0] for level in range(levels)),
        "layers_per_block": _count(shapes, f"{down}0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments for CLIPTextConfig, read off an original file's shapes. KeyError names a tensor that is missing.

    Heads are 64 wide and the activation is the quick GELU in every CLIP text encoder of Stable Diffusion 1.
    """
    vocabulary, width = shapes[f"{CLIP_PREFIX}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{CLIP_PREFIX}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, f"{CLIP_PREFIX}encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes[f"{CLIP_PREFIX}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
