"""What a family of models must answer, and how its files are read and written.

A family is one file with one class, and one key map. Everything that trains or paints talks to this interface only.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.errors import UserError, some
from library.models.checkpoint import WeightsFile, open_weights, write_tensors
from library.models.noise import NoiseProcess, torch_generator
from library.models.sgm_keys import KeyMap, Shapes, is_carried, is_dropped, usual_spelling
from library.models.text import TextOptions, TextOutputs, Tokenizer
from library.transfer import to_device


class AttachPoints(NamedTuple):
    """What networks are attached to: trees with the canonical names whose leaves are the model's own modules."""

    text_encoders: list[nn.Module]
    unet: nn.Module


@dataclass(frozen=True)
class LatentSpec:
    """The latent space of a model. `factor`: pixels per latent, each way; `step`: pixels per smallest feature of the
    U-Net, so sizes must be multiples of it; `scale`: what latents are multiplied with for the denoiser.
    """

    channels: int
    factor: int
    step: int
    scale: float


# Modules whose class other programs look for; a view keeps them whole and dissolves everything above them.
_KNOWN_CLASSES = {
    "Transformer2DModel",
    "ResnetBlock2D",
    "Downsample2D",
    "Upsample2D",
    "CLIPAttention",
    "CLIPMLP",
}


def neutral_view(module: nn.Module) -> nn.Module:
    """A tree with the same names and the same leaf modules, whose inner nodes have no class of their own.

    Networks choose modules by class and name; some stop at a class they do not expect.
    """
    children = list(module.named_children())
    if not children or type(module).__name__ in _KNOWN_CLASSES:
        return module
    view = nn.Module()
    for name, child in children:
        view.add_module(name, neutral_view(child))
    return view


class Family(nn.Module, ABC):
    """A model in memory: text encoders, autoencoder and denoiser, and how they work together."""

    name: str  # as in this program
    title: str  # as in a sentence
    base_model_version: str  # as in the metadata key ss_base_model_version
    architecture: str  # as in the metadata key modelspec.architecture
    latents: LatentSpec
    latents_suffix: str  # end of the names of files of cached latents
    text_outputs: TextOutputs
    text_encoders: nn.ModuleList
    vae: nn.Module
    unet: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.text = TextOptions()
        self.carried: dict[str, Tensor] = {}  # tensors of the file that no module uses, written back as they came

    @classmethod
    @abstractmethod
    def recognises(cls, shapes: Shapes) -> bool:
        """Whether an original file with these tensors is of this family."""

    @classmethod
    @abstractmethod
    def latent_spec(cls, shapes: Shapes) -> LatentSpec:
        """The latent space of an original file with these tensors."""

    @classmethod
    @abstractmethod
    def build(cls, shapes: Shapes) -> "Family":
        """The modules for an original file with these tensors, weights as their classes initialise them."""

    @classmethod
    @abstractmethod
    def tokenizers(cls) -> dict[str, Tokenizer]:
        """The tokenizers of its text encoders, by the encoders' usual names."""

    @abstractmethod
    def parts(self) -> list[tuple[nn.Module, KeyMap]]:
        """The modules that make up a file, with their names in it."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str], *, painting: bool = False) -> dict[str, Tensor]:
        """Captions -> what the text encoders say of them, batch first, one entry per encoder and kind; read as `text`
        says. `painting` always heeds weights in captions, and restores the mean over tokens and channels afterwards.
        """

    @abstractmethod
    def condition(self, text: Mapping[str, Tensor], batch: Any = None) -> dict[str, Tensor]:
        """`encode_text`'s answer (fresh or cached) and the batch's sizes -> the denoiser's inputs, batch first."""

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor], **extras: Any) -> Tensor:
        """The denoiser's answer (B, C, h, w) for noisy scaled latents (B, C, h, w) at timesteps (B,)."""

    @abstractmethod
    def noise_process(self) -> NoiseProcess:
        """The noise this model was trained with."""

    @abstractmethod
    def attach_points(self) -> AttachPoints:
        """What networks may be attached to."""

    @abstractmethod
    def enable_gradient_checkpointing(self, unet: bool = True, text_encoders: bool = False) -> None:
        """Compute activations twice instead of keeping them; takes effect in training mode."""

    def read_captions(self, options: TextOptions) -> None:
        """Have captions read in this way from now on. UserError if a text encoder has too few layers for it."""
        layers = min(encoder.layers for encoder in self.text_encoders)
        if options.clip_skip is not None and options.clip_skip > layers:
            raise UserError(
                f"--clip_skip {options.clip_skip} is too large: this model's text encoder has {layers} layers"
            )
        self.text = options

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

    @classmethod
    def load_vae(
        cls, path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Family":
        """A model whose autoencoder is read from an original single file, in evaluation mode, and nothing else: its
        other weights are nowhere. UserError if the file's autoencoder is not complete.
        """
        with open_weights(path) as file:
            keys = {usual_spelling(key): key for key in file.shapes()}
            with torch.device("meta"), complete(cls, file):
                model = cls.build(usual_shapes(file))
            names = next(names for module, names in model.parts() if module is model.vae)
            _fill(model.vae, names, file, keys, dtype=dtype, device=device)
        _assert_materialised(model.vae)
        return model.eval()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype | None = None,
        vae_device: torch.device | str | None = None,
    ) -> "Family":
        """Read an original single file, in evaluation mode; `vae_dtype` and `vae_device` are the autoencoder's if they
        differ. UserError if the file is not a complete model of this family.
        """
        with open_weights(path) as file:
            keys = {usual_spelling(key): key for key in file.shapes()}
            with torch.device("meta"), complete(cls, file):
                model = cls.build(usual_shapes(file))
            left = set(keys)
            for module, names in model.parts():
                special = (vae_dtype or dtype, vae_device or device) if module is model.vae else (dtype, device)
                left -= _fill(module, names, file, keys, dtype=special[0], device=special[1])
            unknown = sorted(keys[name] for name in left if not is_dropped(name) and not is_carried(name))
            if unknown:
                raise UserError(f"{file.path} holds tensors that no {cls.title} model has: {some(unknown)}")
            model.carried = {name: file.get(keys[name]) for name in sorted(left) if is_carried(name)}
        model.rebuild_buffers(device)
        _assert_materialised(model)
        return model.eval()

    def rebuild_buffers(self, device: torch.device | str) -> None:
        """Make anew the buffers that no file holds."""
        for encoder in self.text_encoders:
            encoder.rebuild_buffers(device)

    def tensors(self) -> dict[str, Tensor]:
        """The weights under their names and shapes in an original file; no copies."""
        tensors = dict(self.carried)
        for module, names in self.parts():
            for name, tensor in module.state_dict().items():
                tensors[names.original(name)] = tensor.reshape(names.original_shape(name, tensor.shape))
        return tensors

    def save(
        self,
        path: str | os.PathLike,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write an original single file, .safetensors or .ckpt by its suffix, in `dtype` or as the weights are."""
        write_tensors(path, self.tensors(), dtype, metadata)


def _fill(
    module: nn.Module,
    names: KeyMap,
    file: WeightsFile,
    keys: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> set[str]:
    """Fill a module built on the meta device from an original file; each tensor is read once, straight into its place.

    `keys` maps the layout's own names to the file's. Returns those of the layout's names that were used. UserError
    names the first tensors that are missing or have another shape than the module's.
    """
    state, used, missing, misshapen = {}, set(), [], []
    for name, parameter in module.state_dict().items():
        original = names.original(name)
        if original not in keys:
            missing.append(original)
            continue
        key = keys[original]
        used.add(original)
        if _without_trailing_ones(file.shape(key)) != _without_trailing_ones(parameter.shape):
            misshapen.append(f"{key} has shape {file.shape(key)}, not {names.original_shape(name, parameter.shape)}")
            continue
        state[name] = file.get(key, dtype).reshape(parameter.shape).to(device)
    if missing:
        raise UserError(f"{file.path} lacks {some(missing)}: it is not a complete Stable Diffusion model")
    if misshapen:
        raise UserError(f"{file.path} does not fit together: {some(misshapen)}")
    module.load_state_dict(state, assign=True)
    return used


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Linear and 1x1 convolution weights hold the same numbers."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _assert_materialised(module: nn.Module) -> None:
    """No parameter or buffer may be left on the meta device: computing with one gives garbage without an error."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"never filled: {some(left)}"


def usual_shapes(file: WeightsFile) -> dict[str, tuple[int, ...]]:
    """The shapes in a file by the layout's own names."""
    return {usual_spelling(key): shape for key, shape in file.shapes().items()}


@contextmanager
def complete(family: type[Family], file: WeightsFile) -> Iterator[None]:
    """Say which tensor is missing where shapes are read off a file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{file.path} lacks {error.args[0]}: it is not a complete {family.title} model") from error
