"""Which families there are, and which of them a file belongs to."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from library.errors import UserError, some
from library.models.checkpoint import Hashes, WeightsFile, hash_file, open_weights
from library.models.family import Family, LatentSpec, complete, usual_shapes
from library.models.sd import StableDiffusion1
from library.models.sgm_keys import VAE_PREFIX, is_carried, usual_spelling

FAMILIES: tuple[type[Family], ...] = (StableDiffusion1,)

_VAE_ENCODER = (f"{VAE_PREFIX}encoder.", f"{VAE_PREFIX}quant_conv.")

# What files that are no model of ours look like: part of a tensor's name -> what to say.
_OTHER_FILES = {
    "lora_down.weight": "is a LoRA, not a model: give the model that the LoRA belongs to",
    "lora_A.weight": "is a LoRA, not a model: give the model that the LoRA belongs to",
    "lora.down.weight": "is a LoRA, not a model: give the model that the LoRA belongs to",
    "hada_w1_a": "is a LyCORIS network, not a model: give the model that it belongs to",
    "lokr_w1": "is a LyCORIS network, not a model: give the model that it belongs to",
    "emb_params": "is a Textual Inversion embedding, not a model: give the model that it belongs to",
    "string_to_param": "is a Textual Inversion embedding, not a model: give the model that it belongs to",
    "conditioner.embedders.": "is an SDXL model, which is not supported here: give a Stable Diffusion 1.x model",
    "cond_stage_model.model.": "is a Stable Diffusion 2.x model, which is not supported here: give a 1.x model",
    "control_model.": "is a ControlNet, not a model: give a complete Stable Diffusion checkpoint",
    "down_blocks.": "is one part of a model in Diffusers' layout: give a checkpoint in the original single-file layout",
    "decoder.conv_in.": "is an autoencoder without its model: give a complete Stable Diffusion checkpoint",
    "text_model.": "is a text encoder without its model: give a complete Stable Diffusion checkpoint",
}


def detect(file: WeightsFile) -> type[Family]:
    """The family of an open file, from its names and shapes. UserError that says what the file is instead."""
    shapes = usual_shapes(file)
    for family in FAMILIES:
        if family.recognises(shapes):
            return family
    for part, what in _OTHER_FILES.items():
        if any(part in key for key in shapes):
            raise UserError(f"{file.path} {what}")
    titles = " or ".join(family.title for family in FAMILIES)
    raise UserError(f"{file.path} is not a {titles} checkpoint: its tensors are named {some(sorted(shapes))}")


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself without reading its weights."""

    path: Path
    family: type[Family]
    latents: LatentSpec

    @cached_property
    def hashes(self) -> Hashes:
        """The file's hashes; reads all of it, once."""
        return hash_file(self.path)

    @cached_property
    def vae_fingerprint(self) -> str:
        """What tells autoencoders apart that make different latents: a hash of the encoder's weights as they are
        stored, under the layout's own names. Reads them once; decoders make no difference.
        """
        with open_weights(self.path) as file:
            return fingerprint(file, _VAE_ENCODER)

    @cached_property
    def text_fingerprint(self) -> str:
        """The same for its text encoders."""
        with open_weights(self.path) as file:
            return fingerprint(file, self.family.text_outputs.prefixes)

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Family:
        """Read the model's autoencoder alone; see `Family.load_vae`."""
        return self.family.load_vae(self.path, dtype, device)

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype | None = None,
        vae_device: torch.device | str | None = None,
    ) -> Family:
        """Read the model; see `Family.load`."""
        return self.family.load(self.path, dtype, device, vae_dtype, vae_device)


def inspect_model(path: str | os.PathLike) -> ModelInfo:
    """Recognise a model file from its header. UserError if it is missing, damaged or no model."""
    with open_weights(path) as file:
        family = detect(file)
        with complete(family, file):
            latents = family.latent_spec(usual_shapes(file))
        return ModelInfo(file.path, family, latents)


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
) -> Family:
    """Load a model file of whichever family it is; see `Family.load`."""
    return inspect_model(path).load(dtype, device, vae_dtype)


def fingerprint(file: WeightsFile, prefixes: tuple[str, ...]) -> str:
    """A hash of the tensors whose names start with one of `prefixes`: names, formats, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    keys = {usual_spelling(key): key for key in file.keys()}  # noqa: SIM118 - a file is no mapping
    for name in sorted(keys):
        if name.startswith(prefixes) and not is_carried(name):
            tensor = file.get(keys[name])
            # weights of Linear layers and of 1x1 convolutions hold the same numbers
            digest.update(f"{name} {tensor.dtype} {list(tensor.squeeze().shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
