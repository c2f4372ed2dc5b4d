"""What the miniatures are made of: the trained ones, and the smallest of each family for untrained files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.models.family import Family
from library.models.sd import StableDiffusion1, StableDiffusion2
from library.models.sdxl import StableDiffusionXL

Config = Mapping[str, Any]

FAMILIES = {family.name: family for family in (StableDiffusion1, StableDiffusion2, StableDiffusionXL)}


@dataclass(frozen=True)
class Structure:
    """Arguments of UNet2DConditionModel, of AutoencoderKL and, for each text encoder, of CLIPTextConfig."""

    family: str
    unet: Config
    vae: Config
    text_encoders: tuple[Config, ...]

    def build(self) -> Family:
        """The modules with fresh weights, drawn from torch's global generator."""
        return FAMILIES[self.family].from_configs(self.unet, self.vae, *self.text_encoders)


def vae(*widths: int) -> dict[str, Any]:
    """One residual block a level on the way in, two on the way out."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }


def text_encoder(width: int, layers: int, *, open_clip: bool = False, projection: int | None = None) -> dict[str, Any]:
    """One head, since those of Stable Diffusion are 64 wide, and the whole vocabulary, since prompts need it."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "projection_dim": projection or width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def sd1_unet(widths: tuple[int, int], text_width: int, layers: int = 1) -> dict[str, Any]:
    """Attention at the first level and in the middle, with 8 heads everywhere."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": layers,
        "cross_attention_dim": text_width,
        "attention_head_dim": 8,
    }


def sd2_unet(widths: tuple[int, int], text_width: int, layers: int = 1) -> dict[str, Any]:
    """The same with heads 64 wide, and linear layers around the attention."""
    return sd1_unet(widths, text_width, layers) | {
        "attention_head_dim": tuple(max(1, width // 64) for width in widths),
        "use_linear_projection": True,
    }


def sdxl_unet(
    widths: tuple[int, int], text_width: int, pooled_width: int, size_width: int, layers: int = 1
) -> dict[str, Any]:
    """Attention at the second level and in the middle, two blocks deep; six sizes of `size_width` values each are read
    along with the pooled text.
    """
    return sd2_unet(widths, text_width, layers) | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_width,
        "projection_class_embeddings_input_dim": 6 * size_width + pooled_width,
    }


# 64 channels at least: 32 would leave one channel per normalisation group, which erases the flat colours.
TRAINED_VAE = vae(64, 64, 64, 96)
TRAINED = {
    "sd1": Structure("sd1", sd1_unet((64, 128), 64, layers=2), TRAINED_VAE, (text_encoder(64, 2),)),
    # One text layer more than the first miniature, because SDXL reads the last but one.
    "sdxl": Structure(
        "sdxl",
        sdxl_unet((64, 128), 64 + 16, pooled_width=32, size_width=8),
        TRAINED_VAE,
        (text_encoder(64, 3), text_encoder(16, 2, open_clip=True, projection=32)),
    ),
}

# Sizes suit the trained miniatures' pictures: multiples of 16 pixels.
_UNTRAINED_VAE = vae(32, 32, 32, 32)
UNTRAINED = {
    "sd1": Structure("sd1", sd1_unet((32, 64), 32), _UNTRAINED_VAE, (text_encoder(32, 2),)),
    "sd2": Structure("sd2", sd2_unet((32, 64), 32), _UNTRAINED_VAE, (text_encoder(32, 2, open_clip=True),)),
    "sdxl": Structure(
        "sdxl",
        sdxl_unet((32, 64), 32 + 32, pooled_width=48, size_width=8),
        _UNTRAINED_VAE,
        (text_encoder(32, 2), text_encoder(32, 2, open_clip=True, projection=48)),
    ),
}
