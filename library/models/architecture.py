"""Architectures read off the tensor shapes of an original file, as arguments for Diffusers' and transformers' classes.

Every function raises KeyError with the name of a tensor that is missing, IndexError or ValueError where one has another
number of dimensions.
"""

from collections.abc import Iterable
from typing import Any

from library.models.prompt_weights import BEGIN, END
from library.models.sgm_keys import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, Shapes


def count_numbered(names: Iterable[str], start: str) -> int:
    """How many numbers 0, 1, 2 ... follow `start` in the names."""
    numbers = {name[len(start) :].split(".", 1)[0] for name in names if name.startswith(start)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def unet_config(shapes: Shapes, head_width: int | None = None) -> dict[str, Any]:
    """Arguments for UNet2DConditionModel.

    The number of attention heads, which Diffusers calls `attention_head_dim`, shows in no shape: heads are `head_width`
    wide, or there are 8 of them whatever the width, as in Stable Diffusion 1.
    """
    blocks = f"{UNET_PREFIX}input_blocks."
    middle = f"{UNET_PREFIX}middle_block.1."
    channels, attention, depths, layers = [], [], [], [0]
    for index in range(1, count_numbered(shapes, blocks)):
        if f"{blocks}{index}.0.op.weight" in shapes:
            layers.append(0)
            continue
        layers[-1] += 1
        if layers[-1] == 1:
            channels.append(shapes[f"{blocks}{index}.0.out_layers.3.weight"][0])
            attention.append(f"{blocks}{index}.1.norm.weight" in shapes)
            depths.append(count_numbered(shapes, f"{blocks}{index}.1.transformer_blocks."))
    # Diffusers wants a depth for every level and gives the middle that of the last
    depth = count_numbered(shapes, f"{middle}transformer_blocks.")
    depths = [*(own or 1 for own in depths[:-1]), depth]
    return {
        "in_channels": shapes[f"{blocks}0.0.weight"][1],
        "out_channels": shapes[f"{UNET_PREFIX}out.2.weight"][0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        "transformer_layers_per_block": depth if set(depths) == {depth} else tuple(depths),
        "attention_head_dim": tuple(_heads(width, head_width) for width in channels) if head_width else 8,
        "use_linear_projection": len(shapes[f"{middle}proj_in.weight"]) == 2,
    }


def _heads(width: int, head_width: int) -> int:
    return max(1, width // head_width)


def size_embedding_config(shapes: Shapes, pooled_width: int) -> dict[str, Any]:
    """The arguments for UNet2DConditionModel that SDXL has besides: its embedding of pooled text and six sizes."""
    width = shapes[f"{UNET_PREFIX}label_emb.0.0.weight"][1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled_width) // 6,
        "projection_class_embeddings_input_dim": width,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments for AutoencoderKL."""
    down = f"{VAE_PREFIX}encoder.down."
    levels = count_numbered(shapes, down)
    return {
        "in_channels": shapes[f"{VAE_PREFIX}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE_PREFIX}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE_PREFIX}decoder.conv_in.weight"][1],
        "block_out_channels": tuple(shapes[f"{down}{level}.block.0.conv1.weight"][0] for level in range(levels)),
        "layers_per_block": count_numbered(shapes, f"{down}0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def clip_config(shapes: Shapes, prefix: str = CLIP_PREFIX) -> dict[str, Any]:
    """Arguments for CLIPTextConfig: OpenAI's CLIP, with the quick GELU."""
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    return {
        **_text_config(vocabulary, width),
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_numbered(shapes, f"{prefix}encoder.layers."),
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
    }


def open_clip_config(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Arguments for CLIPTextConfig: OpenCLIP, with the exact GELU."""
    vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
    return {
        **_text_config(vocabulary, width),
        "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_numbered(shapes, f"{prefix}transformer.resblocks."),
        "max_position_embeddings": shapes[f"{prefix}positional_embedding"][0],
        "hidden_act": "gelu",
        "projection_dim": shapes.get(f"{prefix}text_projection", (width, width))[1],
    }


def _text_config(vocabulary: int, width: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": _heads(width, 64),  # 64 wide in every text encoder of Stable Diffusion
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
