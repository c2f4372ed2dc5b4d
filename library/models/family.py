"""What a family of models must answer, and how its files are read and written.

A family is one file with one class, and one key map. Everything that trains or paints talks to this interface only.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from library import console
from library.errors import UserError
from library.models.added_words import AddedRows
from library.models.architecture import unet_config, vae_config
from library.models.files.checkpoint import LazyTensors, write_tensors
from library.models.metadata import IMPLEMENTATION_VERSION
from library.models.noise import DDPM, NoiseProcess, Prediction, torch_generator
from library.models.prediction import MARKERS, markers
from library.models.sgm_keys import KeyMap, Place, Shapes
from library.models.text import TextEncoder, TextOptions, TextOutputs, Tokenizer, Tokens
from library.models.views import AttachPoints
from library.transfer import to_device

Configs = Mapping[str, Mapping[str, Any]]


class Component(NamedTuple):
    """A module, and the names of its tensors in an original file."""

    module: nn.Module
    names: KeyMap


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of a model. `factor`: pixels per latent, each way; `step`: pixels per smallest feature of the
    U-Net, so sizes must be multiples of it; `scale`: what latents are multiplied with for the denoiser.
    `default_size`: pixels each way of a picture nobody said a size for.
    """

    channels: int
    factor: int
    step: int
    scale: float
    default_size: int


class Family(nn.Module, ABC):
    """A model in memory: text encoders, autoencoder and denoiser, and how they work together."""

    name: str  # as in this program
    title: str  # as in a sentence
    base_model_version: str  # as in the metadata key ss_base_model_version
    latent_scale: float
    default_size: int
    text_layer: int  # the layer of the text encoders it was trained with, from the last (1) on
    latents_suffix: str  # end of the names of files of cached latents
    text_outputs: TextOutputs
    embedding_names: ClassVar[tuple[str, ...]]  # of each text encoder's vectors in a file of a Textual Inversion
    pipelines: ClassVar[Mapping[int, str]]  # Diffusers' classes for it, by the number of channels that its U-Net reads
    pipeline_settings: ClassVar[Mapping[str, Any]]  # what such a class is made with besides the model
    scheduler: str  # Diffusers' class that it is published with
    vae_overflows = False  # whether its autoencoder does, in half precision
    text_encoders: nn.ModuleList

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, *text_encoders: TextEncoder):
        super().__init__()
        self.text_encoders = nn.ModuleList(text_encoders)
        self.vae = vae
        self.unet = unet
        self.latents = self._latent_spec(vae.config, unet.config)
        self.text = TextOptions()
        self.prediction = Prediction()
        self.own_tokenizers = tuple(self.tokenizers().values())
        self.carried: dict[str, Tensor] = {}  # tensors of the file that no module uses, written back as they came

    @classmethod
    @abstractmethod
    def recognises(cls, shapes: Shapes) -> bool:
        """Whether an original file with these tensors is of this family."""

    @classmethod
    @abstractmethod
    def build(cls, shapes: Shapes, configs: Configs) -> "Family":
        """The modules for an original file with these tensors, weights as their classes initialise them. `configs` are
        arguments of Diffusers' and transformers' classes, by component, that win over what the shapes tell.
        """

    @classmethod
    @abstractmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        """The tokenizers of its text encoders, by the encoders' usual names."""

    @classmethod
    def as_kind(cls) -> str:
        """What a model of this family is, as in a sentence."""
        return f"{'an' if cls.title.startswith('SD') else 'a'} {cls.title} model"

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As in the metadata key modelspec.architecture."""

    @property
    def picture_size(self) -> int:
        """Pixels each way of the pictures that published models like this one were trained with."""
        return self.default_size

    @property
    def attention_overflows(self) -> bool:
        """Whether the attention of its U-Net does, in half precision."""
        return False

    @abstractmethod
    def components(self) -> dict[str, Component]:
        """The modules that make up a model, by their names in Diffusers' pipelines."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str], *, painting: bool = False) -> dict[str, Tensor]:
        """Captions -> what the text encoders say of them, batch first, one entry per encoder and kind; read as `text`
        says. `painting` always heeds weights in captions, and restores the mean over tokens and channels afterwards.
        """

    @abstractmethod
    def condition(self, text: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """`encode_text`'s answer (fresh or cached) and the pictures' sizes -> the denoiser's inputs, batch first.

        `sizes` (B, 6): original height and width, crop top and left, target height and width, in pixels.
        """

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], **extras: Any) -> Tensor:
        """The denoiser's answer (B, C, h, w) for noisy scaled latents (B, C, h, w) at timesteps (B,), computed in its
        own precision.
        """

    @abstractmethod
    def attach_points(self) -> AttachPoints:
        """What networks may be attached to."""

    @classmethod
    def latent_spec(cls, shapes: Shapes) -> LatentSpec:
        """The latent space of an original file with these tensors."""
        return cls._latent_spec(vae_config(shapes), unet_config(shapes))

    @classmethod
    def _latent_spec(cls, vae: Mapping[str, Any], unet: Mapping[str, Any]) -> LatentSpec:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        return LatentSpec(vae["latent_channels"], factor, step, cls.latent_scale, cls.default_size)

    def noise_process(self) -> NoiseProcess:
        """The noise this model was trained with."""
        return DDPM(self.prediction)

    def enable_gradient_checkpointing(self, unet: bool = True, text_encoders: bool = False) -> None:
        """Compute activations twice instead of keeping them; takes effect in training mode."""
        if unet:
            self.unet.enable_gradient_checkpointing()
        if text_encoders:
            for encoder in self.text_encoders:
                encoder.enable_gradient_checkpointing()

    @classmethod
    def leaves_layers_out(cls, clip_skip: int | None) -> bool:
        """Whether some layers of its text encoders have no part in the answer."""
        return (clip_skip or cls.text_layer) > 1

    def read_captions(self, options: TextOptions) -> None:
        """Have captions read in this way from now on. UserError if a text encoder has too few layers for it."""
        layers = min(encoder.layers for encoder in self.text_encoders)
        if options.clip_skip is not None and options.clip_skip > layers:
            raise UserError(
                f"--clip_skip {options.clip_skip} is too large: this model has a text encoder of {layers} layers"
            )
        if options.clip_skip is not None and options.clip_skip < self.text_layer:
            console.warn(
                f"--clip_skip {options.clip_skip}: {self.title} models were trained with {self.text_layer}, which they "
                "also get without the flag"
            )
        self.text = options

    def add_words(self, words: Mapping[str, Sequence[int]], rows: Sequence[AddedRows]) -> None:
        """Have words in captions read as these ids, from the vocabulary's end on, whose vectors are `rows`: one module
        for each text encoder, which stays the caller's.
        """
        for tokenizer in self.own_tokenizers:
            tokenizer.add(words)
        for encoder, own in zip(self.text_encoders, rows, strict=True):
            own.extend(encoder.clip.embeddings.token_embedding)

    def tokenize(self, tokenizer: Tokenizer, captions: Sequence[str], painting: bool) -> Tokens:
        """Captions as `text` says they are read."""
        text = self.text
        return tokenizer(captions, text.token_length, painting or text.weighted, painting or text.padded)

    def encode_images(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W), -1..1 -> unscaled latents (B, C, H/factor, W/factor), float32, drawn from the
        autoencoder's posterior with one seed per image.
        """
        images = images.to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        draws = [torch.randn(mean.shape[1:], generator=torch_generator(seed, "vae")) for seed in seeds]
        return mean + std * to_device(torch.stack(draws), mean.device)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> images (B, 3, h x factor, w x factor), about -1..1, float32."""
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float()

    def unused_layer(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in an original file, of a layer that comes with this model and that no module uses."""
        return {}

    def rest(self) -> dict[str, Tensor]:
        """What an original file holds besides the modules' tensors: what came with the model, and markers of what it
        predicts, those that came where there are any.
        """
        said = markers(self.prediction)
        return said | {name: tensor for name, tensor in self.carried.items() if name not in MARKERS or name in said}

    def rebuild_buffers(self, device: torch.device | str) -> None:
        """Make anew the buffers that no file holds."""
        for encoder in self.text_encoders:
            encoder.rebuild_buffers(device)

    def tensors(self) -> LazyTensors:
        """The weights under their names and shapes in an original file; nothing is copied before it is asked for."""
        return OriginalTensors(self)

    def description(self) -> dict[str, str]:
        """The `modelspec.*` metadata that follow from the model alone."""
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self.architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.implementation_version": IMPLEMENTATION_VERSION,
            "modelspec.prediction_type": "v" if self.prediction.kind == "v_prediction" else "epsilon",
        }

    def save(
        self,
        path: str | os.PathLike,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Write an original single file, .safetensors or .ckpt by its suffix, in `dtype` or as the weights are.

        A .safetensors gets `metadata`, which win over the model's own description, and the hash of its contents; a
        .ckpt gets the `counts`, such as `global_step`, beside its weights.
        """
        told = self.description() | {**(metadata or {})}
        write_tensors(path, self.tensors(), dtype, told, content_hash=True, beside=counts or {})


class OriginalTensors(LazyTensors):
    """A model's weights in the original layout. Markers say what it predicts, if that is known not to be the noise."""

    def __init__(self, model: Family):
        self._whole = model.rest()
        self._sources: dict[str, tuple[Place, Mapping[str, Tensor]]] = {}
        for component in model.components().values():
            state = component.module.state_dict()
            self._sources |= {place.key: (place, state) for place in component.names.places(state)}

    def __iter__(self) -> Iterator[str]:
        yield from self._sources
        yield from self._whole

    def __len__(self) -> int:
        return len(self._sources) + len(self._whole)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._whole:
            return self._whole[key]
        place, state = self._sources[key]
        return place.join(state)

    def outlines(self) -> Mapping[str, Tensor]:
        outlines = {key: _outline(tensor.shape, tensor.dtype) for key, tensor in self._whole.items()}
        for key, (place, state) in self._sources.items():
            shapes = {name: state[name].shape for name in place.names}
            outlines[key] = _outline(place.shape(shapes), state[place.names[0]].dtype)
        return outlines


def _outline(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
