"""SDXL (Podell et al. 2023, arXiv:2307.01952): two text encoders, an autoencoder, a U-Net that is told sizes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from library.models.architecture import (
    clip_config,
    open_clip_config,
    size_embedding_config,
    unet_config,
    vae_config,
)
from library.models.family import Component, Configs, Family
from library.models.sgm_keys import (
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    Shapes,
    clip_key_map,
    has_all,
    open_clip_key_map,
    unet_key_map,
    vae_key_map,
)
from library.models.text import TextEncoder, TextOutputs, Tokenizer, weigh
from library.models.views import AttachPoints, original_view, text_view


class StableDiffusionXL(Family):
    """SDXL of any size."""

    name = "sdxl"
    title = "SDXL"
    base_model_version = "sdxl_base_v1-0"
    architecture = "stable-diffusion-xl-v1-base"
    latent_scale = 0.13025
    default_size = 1024
    text_layer = 2
    latents_suffix = "_sdxl.npz"
    embedding_names = ("clip_l", "clip_g")
    text_outputs = TextOutputs(
        "_te_outputs.npz",
        {name: name for name in ("hidden_state1", "hidden_state2", "pool2")},
        (SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX),
    )
    pipelines: ClassVar = {
        4: "StableDiffusionXLPipeline",
        8: "StableDiffusionXLInstructPix2PixPipeline",
        9: "StableDiffusionXLInpaintPipeline",
    }
    # Our own pictures and those of web UIs are painted with the empty negative prompt encoded, not with zeros.
    pipeline_settings: ClassVar = {
        "force_zeros_for_empty_prompt": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    scheduler = "EulerDiscreteScheduler"
    vae_overflows = True

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        text_encoder_2: TextEncoder,
    ):
        super().__init__(unet, vae, text_encoder, text_encoder_2)
        self.tokenizer, self.tokenizer_2 = self.own_tokenizers

    @classmethod
    def from_configs(
        cls,
        unet_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        clip_config: Mapping[str, Any],
        open_clip_config: Mapping[str, Any],
    ) -> "StableDiffusionXL":
        """A model with fresh weights, drawn from torch's global generator; the arguments are those of
        UNet2DConditionModel, AutoencoderKL and CLIPTextConfig.
        """
        return cls(
            UNet2DConditionModel(**unet_config),
            AutoencoderKL(**{"scaling_factor": cls.latent_scale, **vae_config}),
            TextEncoder(clip_config, normalises=False),
            TextEncoder(open_clip_config, projects=True, normalises=False),
        )

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return has_all(shapes, UNET_PREFIX, SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX)

    @classmethod
    def build(cls, shapes: Shapes, configs: Configs) -> "StableDiffusionXL":
        second = open_clip_config(shapes, SDXL_OPEN_CLIP_PREFIX)
        unet = unet_config(shapes, head_width=64) | size_embedding_config(shapes, second["projection_dim"])
        return cls.from_configs(
            {**unet, **configs.get("unet", {})},
            {**vae_config(shapes), **configs.get("vae", {})},
            {**clip_config(shapes, SDXL_CLIP_PREFIX), **configs.get("text_encoder", {})},
            {**second, **configs.get("text_encoder_2", {})},
        )

    @classmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        return {"CLIP-L": Tokenizer(), "OpenCLIP-bigG": Tokenizer(pad=0)}

    def encode_text(self, captions: Sequence[str], *, painting: bool = False) -> dict[str, Tensor]:
        """{"hidden_state1": (B, token length + 2, width 1), "hidden_state2": (B, token length + 2, width 2)}: each
        encoder's last layer but one, or clip skip's, without the final norm; and {"pool2": (B, projection width)}, the
        second encoder's projection, in which weights in captions change nothing.
        """
        layer = self.text.clip_skip or self.text_layer
        answer = {}
        for number, tokenizer in enumerate((self.tokenizer, self.tokenizer_2), 1):
            tokens = self.tokenize(tokenizer, captions, painting)
            encoded = self.text_encoders[number - 1](tokens.ids, layer)
            answer[f"hidden_state{number}"] = weigh(encoded.hidden, tokens.weights, restore_mean=painting)
        return answer | {"pool2": encoded.pooled}

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """{"encoder_hidden_states": (B, token length + 2, width 1 + width 2), "text_embeds": (B, projection width),
        "time_ids": (B, 6)}.
        """
        return {
            "encoder_hidden_states": torch.cat([text["hidden_state1"], text["hidden_state2"]], dim=-1),
            "text_embeds": text["pool2"],
            "time_ids": sizes,
        }

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], **extras: Any) -> Tensor:
        """The predicted noise or v (B, 4, h, w)."""
        dtype = self.unet.dtype
        return self.unet(
            noisy.to(dtype),
            timesteps,
            condition["encoder_hidden_states"].to(dtype),
            added_cond_kwargs={
                "text_embeds": condition["text_embeds"].to(dtype),
                "time_ids": condition["time_ids"],  # in pixels: half precision would round them
            },
            **extras,
        ).sample

    def attach_points(self) -> AttachPoints:
        return AttachPoints(
            [text_view(encoder.model) for encoder in self.text_encoders],
            original_view(self.unet, unet_key_map(self.unet.config)),
        )

    def components(self) -> dict[str, Component]:
        first, second = self.text_encoders
        second_names = open_clip_key_map(SDXL_OPEN_CLIP_PREFIX, second.layers, projects=True)
        return {
            "unet": Component(self.unet, unet_key_map(self.unet.config)),
            "vae": Component(self.vae, vae_key_map(self.vae.config)),
            "text_encoder": Component(first.model, clip_key_map(SDXL_CLIP_PREFIX)),
            "text_encoder_2": Component(second.model, second_names),
        }
