"""The published sizes of the models: `FAMILY.from_configs(**CONFIGS[name])` is as large as what people train.

Names as in the families' `name`. No torch here.
"""

from collections.abc import Mapping
from typing import Any

Configs = dict[str, dict[str, Any]]

_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}


def _text(width: int, layers: int, activation: str, projection: int) -> dict[str, Any]:
    return _TEXT | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "hidden_act": activation,
        "projection_dim": projection,
    }


_CLIP_L = _text(768, 12, "quick_gelu", 768)

SD15: Configs = {
    "unet_config": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "use_linear_projection": False,
    },
    "vae_config": _VAE,
    "clip_config": _CLIP_L,
}
SD21: Configs = {
    "unet_config": SD15["unet_config"]
    | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "vae_config": _VAE,
    "clip_config": _text(1024, 23, "gelu", 1024),  # of the file's 24 layers the last is not used
}
SDXL: Configs = {
    "unet_config": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae_config": _VAE,
    "clip_config": _CLIP_L,
    "open_clip_config": _text(1280, 32, "gelu", 1280),
}
CONFIGS: Mapping[str, Configs] = {"sd1": SD15, "sd2": SD21, "sdxl": SDXL}
