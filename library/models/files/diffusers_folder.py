"""Diffusers folders, read as if each were one file in the original layout."""

import inspect
import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig

from library import console
from library.errors import UserError, some
from library.models.architecture import count_numbered
from library.models.files.checkpoint import WeightsFile, open_shards, open_weights
from library.models.files.folder_files import CONFIG, INDEX, ORIGINAL_LAYOUT, SCHEDULER, is_index, weights_name
from library.models.files.selection import Selection
from library.models.files.weights_file import HeldTensors
from library.models.sgm_keys import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    KeyMap,
    Place,
    clip_key_map,
    open_clip_key_map,
    unet_key_map,
    vae_key_map,
)
from library.suffixes import WEIGHTS_SUFFIXES

LOGIT_SCALE = math.log(100)  # what CLIP's training ends at, and its cap
_SD1, _SD2, _SDXL = "sd1", "sd2", "sdxl"
# What the parts of a pipeline have to be; others have other tensors under the same names.
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# What is taken from a text encoder's configuration. Its ids of special tokens are not: published ones are wrong.
_TEXT_ARGUMENTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "vocab_size",
    "projection_dim",
)
# What an autoencoder's latents are scaled with: where its configuration says nothing, as its family's are.
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# The attention of autoencoders as Diffusers called it before version 0.15.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class _Converted(WeightsFile):
    """Tensors of a file in Diffusers' layout as `places` puts them into an original file; others are `extra`, original
    name -> name in the file. `spelled`: the layout's own names -> the file's.
    """

    def __init__(
        self, file: WeightsFile, places: list[Place], spelled: Mapping[str, str], extra: Mapping[str, str]
    ) -> None:
        self.path, self.metadata, self.configs = file.path, file.metadata, file.configs
        self._file, self._spelled, self._extra = file, spelled, extra
        self._places = {place.key: place for place in places}

    def keys(self) -> list[str]:
        return [*self._places, *self._extra]

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._extra:
            return self._file.shape(self._extra[key])
        place = self._places[key]
        return place.shape({name: self._part_shape(place, name) for name in place.names})

    def dtype(self, key: str) -> torch.dtype:
        return self._file.dtype(self._extra[key] if key in self._extra else self._spelled[self._places[key].names[0]])

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        if key in self._extra:
            return self._file.get(self._extra[key], dtype)
        place = self._places[key]
        parts = {
            name: self._file.get(self._spelled[name], dtype).reshape(self._part_shape(place, name))
            for name in place.names
        }
        return place.join(parts).contiguous()

    def verify(self) -> None:
        self._file.verify()

    def close(self) -> None:
        self._file.close()

    def _part_shape(self, place: Place, name: str) -> tuple[int, ...]:
        shape = self._file.shape(self._spelled[name])
        # some programs wrote 1x1 convolutions where Diffusers has linear layers
        return shape[:2] if place.convolved and shape[2:] == (1, 1) else shape


class _Made(HeldTensors):
    """Tensors in memory as a file's."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.metadata, self._tensors = path, {}, dict(tensors)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._tensors[key]
        return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=True)


def open_folder(path: Path, variant: str | None = None, without: Collection[str] = ()) -> WeightsFile:
    """A Diffusers pipeline's tensors under their names in an original file, with what such a file has besides: from the
    folder's `original_layout.safetensors`, or made anew and named in a notice. Weights of a `variant` come first.
    Components that it is opened `without` are not looked for.

    UserError if the folder is no pipeline of Stable Diffusion, or a part of it is missing or damaged.
    """
    family, components = _recognise(path, without)
    with ExitStack() as opened:
        parts = {}
        for component in components:
            parts[component] = opened.enter_context(_open_part(path / component, component, family, variant))
        configs = {name: config for part in parts.values() for name, config in part.configs.items()}
        if (path / SCHEDULER).is_file():
            configs["scheduler"] = read_json(path / SCHEDULER)
        entries = {key: (part, key) for part in parts.values() for key in part.keys()}  # noqa: SIM118 - no mappings
        side, rest = _rest(path, family, parts)
        opened.pop_all()
        told = _of_the_model(parts["unet"]) or _of_the_model(side)  # .bin files have none
        return Selection(path, entries | rest, [*parts.values(), side], told, configs)


def _of_the_model(file: WeightsFile) -> dict[str, str]:
    """A file's metadata but for what holds for that one file."""
    return {name: text for name, text in file.metadata.items() if name != "format" and "hash" not in name}


def family_of_folder(path: Path) -> str | None:
    """The name of the family that a whole model in a folder is of, whatever its autoencoder; None for other folders."""
    if (path / INDEX).is_file():
        with suppress(UserError):
            return _recognise(path, without=("vae",))[0]
    return None


def open_component(folder: Path, component: str) -> WeightsFile:
    """The autoencoder ("vae") of a Diffusers folder under its names in an original file."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no autoencoder in Diffusers' layout: it has no {CONFIG}")
    return _open_part(folder, component, _SD1, None)


def config_beside(path: Path) -> dict[str, Any]:
    """The configuration that lies beside an autoencoder's weights in Diffusers' layout; empty where what lies there is
    not, by its own word, for these.
    """
    config = path.with_name(CONFIG)
    if not path.name.startswith("diffusion_pytorch_model.") or not config.is_file():
        return {}
    return _arguments(config, "vae") if read_json(config).get("_class_name") in _CLASSES["vae"] else {}


def with_original_names(
    file: WeightsFile, component: str, configs: Mapping[str, Mapping[str, Any]] | None = None, family: str = _SD1
) -> WeightsFile:
    """An open file that holds one `component` in Diffusers' layout, under its names in an original file of a `family`.

    An autoencoder and text encoders need no configuration: how many layers they have shows in the names. Tensors that
    the layout does not have keep their names, behind the component's. Closing it closes `file`.
    """
    file.configs = {name: config for name, config in (configs or {}).items() if name == component}
    keys = file.keys()
    spelled = {_usual_name(component, key): key for key in keys}
    names = _key_map(component, family, list(spelled), file.configs.get(component, {}))
    known, extra = [], {}
    for name, key in spelled.items():
        if component.startswith("text_encoder") and name.endswith("embeddings.position_ids"):
            continue  # counted anew everywhere, and broken in some files
        try:
            names.original(name)
            known.append(name)
        except KeyError:
            extra[f"{component}.{key}"] = key
    return _Converted(file, names.places(known), spelled, extra)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not JSON: copy the folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, it holds no JSON object: copy the folder again")
    return content


def _recognise(path: Path, without: Collection[str] = ()) -> tuple[str, list[str]]:
    """The family of the model in a folder, and the parts that it has to have."""
    if not (path / INDEX).is_file():
        raise UserError(f"{path} is a folder without {INDEX}, so no model in Diffusers' layout{_better(path)}")
    index = read_json(path / INDEX)
    present = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    components = [name for name in _CLASSES if present.get(name) and name not in without]
    wrong = [name for name in components if present[name] not in _CLASSES[name]]
    if wrong or not {"unet", "vae", "text_encoder"} - {*without} <= {*components}:
        why = (
            f"its {wrong[0]} is a {present[wrong[0]]}"
            if wrong
            else "it lacks a U-Net, an autoencoder or a text encoder"
        )
        raise UserError(
            f"{path} is a {index.get('_class_name')}, which is no model of Stable Diffusion 1.x, 2.x or SDXL: {why}"
        )
    if "text_encoder_2" in components:
        return _SDXL, components
    activation = read_json(path / "text_encoder" / CONFIG).get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise UserError(f"{path} has a text encoder with {activation}, which is not that of Stable Diffusion")
    return (_SD2 if activation == "gelu" else _SD1), components


def _better(path: Path) -> str:
    """The end of a sentence about a folder that is no model: what to give instead."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in WEIGHTS_SUFFIXES)
    if len(files) == 1:
        return f": give the file in it, {files[0]}"
    inner = [folder for folder in path.iterdir() if (folder / INDEX).is_file()]
    return f", did you mean {inner[0]}?" if len(inner) == 1 else ": give a model's file, or its whole folder"


def _open_part(folder: Path, component: str, family: str, variant: str | None) -> WeightsFile:
    """One component's tensors under their original names; its `configs` have its own alone."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the model is incomplete, copy the folder again")
    config = _arguments(folder / CONFIG, component)
    name = weights_name(component, {file.name for file in folder.iterdir()}, variant)
    if name is None:
        raise UserError(f"{folder} holds no weights: the model is incomplete, copy the folder again")
    file = open_shards(folder / name) if is_index(name) else open_weights(folder / name)
    try:
        return with_original_names(file, component, {component: config}, family)
    except BaseException:
        file.close()
        raise


def _arguments(path: Path, component: str) -> dict[str, Any]:
    """A component's configuration as arguments of its class, complete for those of Diffusers but for the scaling."""
    config = read_json(path)
    if component.startswith("text_encoder"):
        defaults = CLIPTextConfig()
        return {name: config.get(name, getattr(defaults, name)) for name in _TEXT_ARGUMENTS}
    if config.get("_class_name", _CLASSES[component][0]) not in _CLASSES[component]:
        raise UserError(f"{path} is of a {config['_class_name']}, which is not that of Stable Diffusion")
    kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
    parameters = [p for p in inspect.signature(kind.__init__).parameters.values() if p.default is not p.empty]
    values = {
        parameter.name: config.get(parameter.name, parameter.default)
        for parameter in parameters
        if parameter.name in config or parameter.name not in _SCALING
    }
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _usual_name(component: str, key: str) -> str:
    """A tensor's name in the module of this version of Diffusers or transformers."""
    if component == "vae":
        module, _, parameter = key.rpartition(".")
        head, _, last = module.rpartition(".")
        return f"{head}.{_OLD_ATTENTION[last]}.{parameter}" if last in _OLD_ATTENTION else key
    if component == "unet":
        return key
    name = key.removeprefix("text_model.")
    return f"text_model.{name}" if component == "text_encoder_2" and not name.startswith("text_projection.") else name


def _key_map(component: str, family: str, names: list[str], config: Mapping[str, Any]) -> KeyMap:
    if component == "unet":
        return unet_key_map(config)
    if component == "vae":
        layers = count_numbered(names, "encoder.down_blocks.0.resnets.")
        levels = count_numbered(names, "encoder.down_blocks.")
        return vae_key_map({"layers_per_block": layers, "block_out_channels": (0,) * levels})
    if component == "text_encoder_2":
        layers = count_numbered(names, "text_model.encoder.layers.")
        return open_clip_key_map(SDXL_OPEN_CLIP_PREFIX, layers, projects=True)
    if family == _SD2:
        return open_clip_key_map(OPEN_CLIP_PREFIX, count_numbered(names, "encoder.layers."))
    return clip_key_map(SDXL_CLIP_PREFIX if family == _SDXL else CLIP_PREFIX)


def _rest(
    path: Path, family: str, parts: Mapping[str, WeightsFile]
) -> tuple[WeightsFile, dict[str, tuple[WeightsFile, str]]]:
    """What an original file has besides: one more file, and name -> (file, name there)."""
    if (path / ORIGINAL_LAYOUT).is_file():
        file = open_weights(path / ORIGINAL_LAYOUT)
        return file, {key: (file, key) for key in file.keys()}  # noqa: SIM118 - a file is no mapping
    copied, made = {}, {}
    if family == _SD2:
        copied, made = _unused_of_sd2(parts["text_encoder"])
    else:
        prefix = SDXL_CLIP_PREFIX if family == _SDXL else CLIP_PREFIX
        shapes = parts["text_encoder"].shapes()
        positions = shapes.get(f"{prefix}embeddings.position_embedding.weight", (77,))[0]
        made[f"{prefix}embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    if family == _SDXL:
        made[f"{SDXL_OPEN_CLIP_PREFIX}logit_scale"] = torch.tensor(LOGIT_SCALE, dtype=_format(parts["text_encoder_2"]))
    names = sorted(made)
    layers = sorted({key.rpartition("resblocks.")[2].split(".")[0] for key in copied})
    names += [f"{OPEN_CLIP_PREFIX}transformer.resblocks.{number}" for number in layers]
    console.notice(f"{path} has no {ORIGINAL_LAYOUT}: what no folder of Diffusers' holds is made anew, {some(names)}")
    file = _Made(path, made)
    return file, copied | {key: (file, key) for key in made}


def _unused_of_sd2(part: WeightsFile) -> tuple[dict[str, tuple[WeightsFile, str]], dict[str, Tensor]]:
    """What a file of Stable Diffusion 2.x has of its text encoder and never uses: a last layer, made a copy of the one
    before it, a projection and a scale.
    """
    keys, start = part.keys(), f"{OPEN_CLIP_PREFIX}transformer.resblocks."
    layers = count_numbered(keys, start)
    last = f"{start}{layers - 1}."
    copied = {key.replace(last, f"{start}{layers}."): (part, key) for key in keys if key.startswith(last)}
    shape = part.shapes().get(f"{OPEN_CLIP_PREFIX}ln_final.weight", (1024,))
    made = {
        f"{OPEN_CLIP_PREFIX}text_projection": torch.eye(shape[0], dtype=_format(part)),
        f"{OPEN_CLIP_PREFIX}logit_scale": torch.tensor(LOGIT_SCALE, dtype=_format(part)),
    }
    return copied, made


def _format(part: WeightsFile) -> torch.dtype:
    """The number format of a part's weights."""
    formats = (part.dtype(key) for key in part.keys())  # noqa: SIM118 - a file is no mapping
    return next((dtype for dtype in formats if dtype.is_floating_point), torch.float32)
