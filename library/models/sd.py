"""Stable Diffusion 1.x: one CLIP text encoder, an autoencoder and a U-Net that predicts the noise."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from library.models.family import AttachPoints, Family, LatentSpec, neutral_view
from library.models.noise import DDPM, NoiseProcess
from library.models.sgm_keys import (
    CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    KeyMap,
    Shapes,
    clip_config,
    clip_key_map,
    unet_config,
    unet_key_map,
    vae_config,
    vae_key_map,
)
from library.models.text import TextEncoder, TextOutputs, Tokenizer, weigh


class StableDiffusion1(Family):
    """Stable Diffusion 1.x of any size."""

    name = "sd1"
    title = "Stable Diffusion 1.x"
    base_model_version = "sd_v1"
    architecture = "stable-diffusion-v1"
    latents_suffix = "_sd.npz"
    text_outputs = TextOutputs("_sd_te_outputs.npz", {"hidden_state1": "hidden_state1"}, (CLIP_PREFIX,))

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: TextEncoder):
        super().__init__()
        self.text_encoders = nn.ModuleList([text_encoder])
        self.vae = vae
        self.unet = unet
        self.latents = _latent_spec(vae.config, unet.config)
        (self.tokenizer,) = self.tokenizers().values()

    @classmethod
    def from_configs(
        cls, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], clip_config: Mapping[str, Any]
    ) -> "StableDiffusion1":
        """A model with fresh weights, drawn from torch's global generator; the arguments are those of
        UNet2DConditionModel, AutoencoderKL and CLIPTextConfig.
        """
        unet, vae = UNet2DConditionModel(**unet_config), AutoencoderKL(**vae_config)
        return cls(unet, vae, TextEncoder(dict(clip_config)))

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        starts = (UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX)
        return all(any(key.startswith(start) for key in shapes) for start in starts)

    @classmethod
    def latent_spec(cls, shapes: Shapes) -> LatentSpec:
        return _latent_spec(vae_config(shapes), unet_config(shapes))

    @classmethod
    def build(cls, shapes: Shapes) -> "StableDiffusion1":
        return cls.from_configs(unet_config(shapes), vae_config(shapes), clip_config(shapes))

    @classmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        return {"CLIP-L": Tokenizer()}

    def parts(self) -> list[tuple[nn.Module, KeyMap]]:
        return [
            (self.unet, unet_key_map(self.unet.config)),
            (self.vae, vae_key_map(self.vae.config)),
            (self.text_encoders[0].model, clip_key_map()),
        ]

    def encode_text(self, captions: Sequence[str], *, painting: bool = False) -> dict[str, Tensor]:
        """{"hidden_state1": (B, token length + 2, width)}: the last layer, or clip skip's, through the final norm."""
        tokens = self.tokenizer(captions, self.text.token_length, painting or self.text.weighted)
        hidden = self.text_encoders[0](tokens.ids, self.text.clip_skip or 1)
        return {"hidden_state1": weigh(hidden, tokens.weights, restore_mean=painting)}

    def condition(self, text: Mapping[str, Tensor], batch: Any = None) -> dict[str, Tensor]:
        """{"encoder_hidden_states": (B, token length + 2, width)}."""
        return {"encoder_hidden_states": text["hidden_state1"]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], **extras: Any) -> Tensor:
        """The predicted noise (B, 4, h, w); inputs are cast to the U-Net's precision."""
        dtype = self.unet.dtype
        condition = {name: tensor.to(dtype) for name, tensor in condition.items()}
        return self.unet(noisy.to(dtype), timesteps, **condition, **extras).sample

    def noise_process(self) -> NoiseProcess:
        return DDPM()

    def attach_points(self) -> AttachPoints:
        # canonical names have a `text_model` level, which transformers 5 dissolved
        text = nn.Module()
        text.add_module("text_model", neutral_view(self.text_encoders[0].model))
        return AttachPoints([text], neutral_view(self.unet))

    def enable_gradient_checkpointing(self, unet: bool = True, text_encoders: bool = False) -> None:
        if unet:
            self.unet.enable_gradient_checkpointing()
        if text_encoders:
            self.text_encoders[0].enable_gradient_checkpointing()


def _latent_spec(vae: Mapping[str, Any], unet: Mapping[str, Any]) -> LatentSpec:
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return LatentSpec(
        channels=vae["latent_channels"],
        factor=factor,
        step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        scale=0.18215,
    )
