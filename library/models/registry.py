"""Which families there are, and which of them a file belongs to."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError, some
from library.models import loading
from library.models.family import Family, LatentSpec
from library.models.files.checkpoint import Hashes, WeightsFile, hash_file, open_weights
from library.models.files.diffusers_folder import family_of_folder
from library.models.files.hub import find_model
from library.models.files.sources import open_model
from library.models.loading import complete
from library.models.noise import Prediction
from library.models.prediction import check_schedule, looks_like_v, prediction_of
from library.models.prompt_weights import CHUNK, END
from library.models.sd import StableDiffusion1, StableDiffusion2
from library.models.sdxl import StableDiffusionXL
from library.models.sgm_keys import UNET_PREFIX, VAE_PREFIX, Shapes, is_carried, usual_keys, usual_shapes

FAMILIES: tuple[type[Family], ...] = (StableDiffusion1, StableDiffusion2, StableDiffusionXL)
_SCALES = {family.name: family.latent_scale for family in FAMILIES}

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
    "conditioner.embedders.0.model.": "is an SDXL refiner, which cannot be trained here: give an SDXL base model",
    "double_blocks.": "is a FLUX model, which cannot be trained here: give a Stable Diffusion 1.x, 2.x or SDXL model",
    "joint_blocks.": "is an SD3 model, which cannot be trained here: give a Stable Diffusion 1.x, 2.x or SDXL model",
    "control_model.": "is a ControlNet, not a model: give a complete Stable Diffusion checkpoint",
    "controlnet_": "is a ControlNet, not a model: give a complete Stable Diffusion checkpoint",
    UNET_PREFIX: "has a U-Net but no text encoder: give a complete Stable Diffusion checkpoint",
    "down_blocks.": "is one part of a model in Diffusers' layout: give the folder that it came in, or a checkpoint",
    "decoder.conv_in.": "is an autoencoder without its model: give a complete Stable Diffusion checkpoint",
    "text_model.": "is a text encoder without its model: give a complete Stable Diffusion checkpoint",
    "clip_g": "is a Textual Inversion embedding, not a model: give the model that it belongs to",
}
_POSITIONS = ("position_embedding.weight", "positional_embedding")
# What the configuration of an autoencoder says of how its latents are scaled.
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_SMALL = 4096  # values of a tensor that is read where only models are to be told apart
# Channels that a U-Net reads besides noisy latents.
_KINDS = {
    4: None,
    5: "a depth-to-image model",
    8: "a model that edits images by instructions",
    9: "an inpainting model",
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
    titles = ", ".join(family.title for family in FAMILIES[:-1]) + f" or {FAMILIES[-1].title}"
    raise UserError(f"{file.path} is not a {titles} checkpoint: its tensors are named {some(sorted(shapes))}")


@dataclass(frozen=True)
class ModelInfo:
    """What a model says of itself without reading its weights. `name`: what was asked for, `path`: where that is here;
    `vae` and `vae_path`: the same of an autoencoder that takes the place of its own. Of a folder's weights those of
    `variant` come first.
    """

    name: str
    path: Path
    family: type[Family]
    latents: LatentSpec
    input_channels: int
    prediction: Prediction | None
    """What it says its denoiser predicts; None if it says nothing."""
    vae: str | None = None
    vae_path: Path | None = None
    variant: str | None = None
    looks_like_v: bool = False
    """Whether it says nothing and very probably predicts v; see `prediction.looks_like_v`."""

    @property
    def kind(self) -> str | None:
        """What it is if its U-Net reads more than noisy latents, as in a sentence."""
        return _KINDS.get(self.input_channels, f"a model whose U-Net reads {self.input_channels} channels")

    def open(self) -> WeightsFile:
        """Its tensors, under the names of the original layout."""
        return open_model(self.path, self.vae_path, self.variant)

    @cached_property
    def hashes(self) -> Hashes | None:
        """The file's hashes; reads all of it, once. None for a folder."""
        return None if self.path.is_dir() else hash_file(self.path)

    @cached_property
    def vae_hashes(self) -> Hashes | None:
        """The same for the file of another autoencoder, if there is one."""
        return hash_file(self.vae_path) if self.vae_path and self.vae_path.is_file() else None

    @cached_property
    def identity(self) -> str:
        """What tells models apart that a run may start from: a hash of the names, shapes and number formats of all
        tensors, and of the contents of the small ones, which every training changes.
        """
        with self.open() as file:
            return fingerprint(file, ("",), largest=_SMALL)

    @cached_property
    def vae_fingerprint(self) -> str:
        """What tells autoencoders apart that make different latents: a hash of the encoder's weights as they are
        stored, under the layout's own names. Reads them once; decoders make no difference.
        """
        with self.open() as file:
            return fingerprint(file, _VAE_ENCODER)

    @cached_property
    def text_fingerprint(self) -> str:
        """The same for its text encoders."""
        with self.open() as file:
            return fingerprint(file, self.family.text_outputs.prefixes)

    def outline(self) -> Family:
        """The model without any weights, on the meta device. UserError if its parts do not fit together."""
        with self.open() as file:
            return loading.outline(self.family, file)

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Family:
        """Read the model's autoencoder alone; see `loading.load_vae`."""
        with self.open() as file:
            return loading.load_vae(self.family, file, dtype, device)

    def load_text_encoders(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Family:
        """Read the model's text encoders alone; see `loading.load_text_encoders`."""
        with self.open() as file:
            return loading.load_text_encoders(self.family, file, dtype, device)

    def load(
        self,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype | None = None,
        vae_device: torch.device | str | None = None,
        exact: Callable[[str], bool] = lambda component: False,
    ) -> Family:
        """Read the model, which predicts what it says it does; see `loading.load`. UserError also if the file names a
        hash of its contents and they have another.
        """
        with self.open() as file:
            file.verify()
            model = loading.load(self.family, file, dtype, device, vae_dtype, vae_device, exact)
        model.prediction = self.prediction or Prediction()
        return model


def inspect_model(
    name: str | os.PathLike, vae: str | os.PathLike | None = None, variant: str | None = None
) -> ModelInfo:
    """Recognise a model file, folder or repository from its headers; see `open_model`. UserError if it is missing,
    damaged, no model, or one that cannot be used here.
    """
    path = find_model(name, variant=variant)
    vae_path = None if vae is None else find_model(vae, flag="--vae")
    with open_model(path, vae_path, variant) as file:
        family = detect(file)
        with complete(family, file):
            shapes = usual_shapes(file)
            latents, channels = family.latent_spec(shapes), shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"][1]
            made = shapes[f"{UNET_PREFIX}out.2.weight"][0]
        if latents.channels != made:
            raise UserError(
                f"{vae_path or path} does not fit: its autoencoder's latents have {latents.channels} channels, those "
                f"of the U-Net in {path} have {made}"
            )
        _check_text_encoders(file, family, shapes)
        _check_scaling(vae_path or path, file.configs.get("vae", {}), family)
        if vae_path and file.configs.get("vae", {}).get("scaling_factor") is None:
            _check_scaling(vae_path, {"scaling_factor": _scale_of_model(vae_path)}, family)
        check_schedule(file)
        said = prediction_of(file)
        return ModelInfo(
            name=str(name),
            path=path,
            family=family,
            latents=latents,
            input_channels=channels,
            prediction=said,
            vae=None if vae is None else str(vae),
            vae_path=vae_path,
            variant=variant,
            looks_like_v=said is None and family is StableDiffusion2 and channels == made and looks_like_v(file),
        )


def _check_text_encoders(file: WeightsFile, family: type[Family], shapes: Shapes) -> None:
    """Whether the text encoders take what the tokenizers here give: one vocabulary, in rows of one length."""
    for name, shape in shapes.items():
        rows = shape[0] if shape and name.startswith(family.text_outputs.prefixes) else None
        if rows is not None and name.endswith("token_embedding.weight") and rows != END + 1:
            raise UserError(
                f"{file.path} cannot be used: its {name} is for {rows} tokens, and {family.title} models have "
                f"{END + 1}, give the model that it was made from"
            )
        if rows is not None and name.endswith(_POSITIONS) and rows < CHUNK + 2:
            raise UserError(
                f"{file.path} cannot be used: its {name} is for {rows} tokens at once, and captions come in "
                f"{CHUNK + 2}, give the model that it was made from"
            )


def _scale_of_model(path: Path) -> float | None:
    """What the latents of a whole model are scaled by; None for what is an autoencoder alone, or no model of ours."""
    if path.is_dir():
        return _SCALES.get(family_of_folder(path))
    with open_weights(path) as file:
        if not any(key.startswith(UNET_PREFIX) for key in file.keys()):  # noqa: SIM118 - a file is no mapping
            return None
        with suppress(UserError):
            return detect(file).latent_scale
    return None


def _check_scaling(path: Path, vae: Mapping[str, Any], family: type[Family]) -> None:
    """Whether an autoencoder's latents are, by its configuration, as the family's denoisers know them. Many say nothing
    of it.
    """
    own = {name: vae[name] for name in _SCALING if vae.get(name) is not None}
    factor = own.get("scaling_factor")
    if isinstance(factor, int | float) and math.isclose(factor, family.latent_scale, rel_tol=1e-4):
        del own["scaling_factor"]
    if own:
        told = " and ".join(f"{name} {value}" for name, value in own.items())
        raise UserError(
            f"{path} has an autoencoder with {told}: latents of {family.title} models are scaled by "
            f"{family.latent_scale} and nothing else, give another one with --vae"
        )


def public_name(name: str) -> str:
    """What others may learn of a model's name: of a path the last part, of a repository on the hub all."""
    return Path(name).name if os.path.exists(name) else name


def load_model(
    name: str | os.PathLike,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
) -> Family:
    """Load a model of whichever family it is; see `ModelInfo.load`."""
    return inspect_model(name).load(dtype, device, vae_dtype)


def fingerprint(file: WeightsFile, prefixes: tuple[str, ...], largest: float = math.inf) -> str:
    """A hash of the tensors whose names start with one of `prefixes`: names, formats, shapes and bytes, these only of
    tensors of at most `largest` values.
    """
    digest = hashlib.blake2b(digest_size=16)
    keys = usual_keys(file)
    for name in sorted(keys):
        if name.startswith(prefixes) and not is_carried(name):
            shape = file.shape(keys[name])
            # weights of Linear layers and of 1x1 convolutions hold the same numbers
            digest.update(f"{name} {file.dtype(keys[name])} {[size for size in shape if size != 1]}\n".encode())
            if math.prod(shape) <= largest:
                digest.update(file.get(keys[name]).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
