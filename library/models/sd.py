"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, an autoencoder and a U-Net."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from library.models.architecture import clip_config, open_clip_config, unet_config, vae_config
from library.models.family import Component, Configs, Family
from library.models.sgm_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    KeyMap,
    Shapes,
    clip_key_map,
    has_all,
    open_clip_key_map,
    unet_key_map,
    vae_key_map,
)
from library.models.text import TextEncoder, TextOutputs, Tokenizer, weigh
from library.models.views import AttachPoints, neutral_view, text_view


class _OneTextEncoder(Family):
    """What the two versions have in common."""

    latent_scale = 0.18215
    default_size = 512
    text_layer = 1
    latents_suffix = "_sd.npz"
    embedding_names = ("emb_params",)
    head_width: int | None  # of the U-Net's attention; None: 8 heads whatever their width
    # models that read the depth of a picture are not here: their pipeline needs a model that tells depths
    pipelines: ClassVar = {
        4: "StableDiffusionPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        9: "StableDiffusionInpaintPipeline",
    }
    pipeline_settings: ClassVar = {
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: TextEncoder):
        super().__init__(unet, vae, text_encoder)
        (self.tokenizer,) = self.own_tokenizers

    @classmethod
    def from_configs(
        cls, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], clip_config: Mapping[str, Any]
    ) -> "Family":
        """A model with fresh weights, drawn from torch's global generator; the arguments are those of
        UNet2DConditionModel, AutoencoderKL and CLIPTextConfig.
        """
        return cls(UNet2DConditionModel(**unet_config), AutoencoderKL(**vae_config), TextEncoder(clip_config))

    @classmethod
    def build(cls, shapes: Shapes, configs: Configs) -> "Family":
        return cls.from_configs(
            {**unet_config(shapes, cls.head_width), **configs.get("unet", {})},
            {**vae_config(shapes), **configs.get("vae", {})},
            {**cls._text_config(shapes), **configs.get("text_encoder", {})},
        )

    def encode_text(self, captions: Sequence[str], *, painting: bool = False) -> dict[str, Tensor]:
        """{"hidden_state1": (B, token length + 2, width)}: the last layer, or clip skip's, through the final norm."""
        tokens = self.tokenize(self.tokenizer, captions, painting)
        hidden = self.text_encoders[0](tokens.ids, self.text.clip_skip or self.text_layer).hidden
        return {"hidden_state1": weigh(hidden, tokens.weights, restore_mean=painting)}

    def condition(self, text: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """{"encoder_hidden_states": (B, token length + 2, width)}; sizes make no difference."""
        return {"encoder_hidden_states": text["hidden_state1"]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], **extras: Any) -> Tensor:
        """The predicted noise or v (B, 4, h, w)."""
        dtype = self.unet.dtype
        condition = {name: tensor.to(dtype) for name, tensor in condition.items()}
        return self.unet(noisy.to(dtype), timesteps, **condition, **extras).sample

    def attach_points(self) -> AttachPoints:
        return AttachPoints([text_view(self.text_encoders[0].model)], neutral_view(self.unet))

    def components(self) -> dict[str, Component]:
        return {
            "unet": Component(self.unet, unet_key_map(self.unet.config)),
            "vae": Component(self.vae, vae_key_map(self.vae.config)),
            "text_encoder": Component(self.text_encoders[0].model, self._text_names()),
        }

    @classmethod
    @abstractmethod
    def _text_config(cls, shapes: Shapes) -> dict[str, Any]:
        """Arguments of CLIPTextConfig for an original file with these tensors."""

    @abstractmethod
    def _text_names(self) -> KeyMap:
        """The names of the text encoder's tensors in an original file."""


class StableDiffusion1(_OneTextEncoder):
    """Stable Diffusion 1.x of any size."""

    name = "sd1"
    title = "Stable Diffusion 1.x"
    base_model_version = "sd_v1"
    architecture = "stable-diffusion-v1"
    head_width = None
    scheduler = "PNDMScheduler"
    text_outputs = TextOutputs("_sd_te_outputs.npz", {"hidden_state1": "hidden_state1"}, (CLIP_PREFIX,))

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return has_all(shapes, UNET_PREFIX, CLIP_PREFIX)

    @classmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        return {"CLIP-L": Tokenizer()}

    @classmethod
    def _text_config(cls, shapes: Shapes) -> dict[str, Any]:
        return clip_config(shapes)

    def _text_names(self) -> KeyMap:
        return clip_key_map()


class StableDiffusion2(_OneTextEncoder):
    """Stable Diffusion 2.x of any size. Its file has one text layer more than it uses."""

    name = "sd2"
    title = "Stable Diffusion 2.x"
    base_model_version = "sd_v2"
    head_width = 64
    scheduler = "DDIMScheduler"
    text_outputs = TextOutputs("_sd2_te_outputs.npz", {"hidden_state1": "hidden_state1"}, (OPEN_CLIP_PREFIX,))

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return has_all(shapes, UNET_PREFIX, OPEN_CLIP_PREFIX)

    @classmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        return {"OpenCLIP-H": Tokenizer(pad=0)}

    @property
    def architecture(self) -> str:
        return "stable-diffusion-v2-768-v" if self.prediction.kind == "v_prediction" else "stable-diffusion-v2-512"

    @property
    def picture_size(self) -> int:
        return 768 if self.prediction.kind == "v_prediction" else self.default_size

    @property
    def attention_overflows(self) -> bool:
        return self.prediction.kind == "v_prediction"  # as of version 2.1

    def unused_layer(self) -> dict[str, tuple[int, ...]]:
        """One layer more, built as the last that is used."""
        layers = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
        count, tensors = self.text_encoders[0].layers, self.tensors().outlines()
        last, unused = f"{layers}{count - 1}.", f"{layers}{count}."
        return {
            name.replace(last, unused): tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(last)
        }

    @classmethod
    def _text_config(cls, shapes: Shapes) -> dict[str, Any]:
        config = open_clip_config(shapes, OPEN_CLIP_PREFIX)
        return {**config, "num_hidden_layers": config["num_hidden_layers"] - 1}

    def _text_names(self) -> KeyMap:
        return open_clip_key_map(OPEN_CLIP_PREFIX, self.text_encoders[0].layers)
