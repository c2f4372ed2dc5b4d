"""Models written as Diffusers folders, complete without anything that would have to be downloaded."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from library.errors import UserError, some
from library.models.family import Family
from library.models.files.checkpoint import write_tensors
from library.models.files.diffusers_folder import read_json
from library.models.files.folder_files import (
    COMPONENTS,
    CONFIG,
    INDEX,
    ORIGINAL_LAYOUT,
    SCHEDULER,
    weights_file_name,
)
from library.models.noise import Prediction, scheduler_config
from library.models.text import Tokenizer, clip_tokenizer
from library.replacing import replacing_folder, working_names

Others = Callable[..., list[str]]
"""`others(folder, unfinished=...)`: the names in it of what must not be lost."""

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_SCHEDULER_FOLDER = SCHEDULER.split("/")[0]
# All that a folder may hold that is replaced, whatever the family: what is written here, and what other programs call
# the same things. Other files would be somebody's own.
_WEIGHTS = (
    r"config\.json|(diffusion_pytorch_model|model|pytorch_model)(\.(fp16|bf16|fp32|ema|non_ema))?"
    r"(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
)
_WORDS = r"(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab)\.json|merges\.txt"
_OWN_FILES = {INDEX, ORIGINAL_LAYOUT}
_OWN_FOLDERS = {
    _SCHEDULER_FOLDER: re.compile(r"scheduler_config\.json").fullmatch,
    **dict.fromkeys(COMPONENTS, re.compile(_WEIGHTS).fullmatch),
    **dict.fromkeys(_TOKENIZERS, re.compile(_WORDS).fullmatch),
}
_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def write_folder(
    model: Family,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    safetensors: bool = True,
    metadata: Mapping[str, str] | None = None,
    reference: Path | None = None,
) -> None:
    """Write a model as a Diffusers folder, in `dtype` or as its weights are; `safetensors=False` writes `.bin` files.

    What the layout has no place for goes into `original_layout.safetensors`, with the metadata. It is written as
    `<folder>.tmp` and takes the place of an older model's folder when it is whole. Tokenizers and scheduler are copied
    from the Diffusers folder `reference` if one is given; what follows from the model's prediction is the model's.
    UserError if the place cannot be written or is in use, Diffusers has no pipeline for the model, or the reference
    lacks something or does not fit.
    """
    index = _index(model)
    told = model.description() | {**(metadata or {})}
    told = {name: text for name, text in told.items() if "hash" not in name}  # those of a whole file
    steps = scheduler(model) if reference is None else _fitted_scheduler(model, reference)
    check_replaceable(Path(folder).resolve())
    with replacing_folder(Path(folder)) as temporary:
        for name, (module, _) in model.components().items():
            text = name.startswith("text_encoder")
            target = temporary / name
            _write_json(target / CONFIG, _text_config(module) if text else _config(model, name, module))
            state = module.state_dict()
            tensors = {_published_name(key): tensor for key, tensor in state.items()} if text else state
            file = target / weights_file_name(name, safetensors=safetensors)
            # transformers refuses files that do not say which library's tensors they are
            write_tensors(file, tensors, dtype, {"format": "pt", **told}, content_hash=True)
        for name, tokenizer in _tokenizers(model).items():
            if reference is None:
                _write_tokenizer(temporary / name, tokenizer)
            else:
                _copy_tokenizer(reference / name, temporary / name)
        _write_json(temporary / SCHEDULER, steps)
        # Also where there is nothing: without the file, a reader would make what other programs' folders lack, and
        # beside `.bin` files there would be no place for metadata. Markers that did not come with the model are for
        # files alone: here the scheduler says what it predicts.
        came = {name: tensor for name, tensor in model.rest().items() if name in model.carried}
        write_tensors(temporary / ORIGINAL_LAYOUT, came, dtype, told, content_hash=True)
        theirs = {} if reference is None else read_json(reference / INDEX)
        index |= {name: theirs[name] for name in _tokenizers(model) if name in theirs}
        _write_json(temporary / INDEX, index | {"scheduler": ["diffusers", steps["_class_name"]]})


def scheduler(model: Family) -> dict[str, Any]:
    """The configuration of the scheduler a model is published with: that of its family, or one that can step as the
    model predicts.
    """
    wanted: Prediction = model.prediction
    kind = model.scheduler
    if kind == "PNDMScheduler" and wanted.kind == "v_prediction":
        kind = "DDIMScheduler"
    if _divides_by_nothing(wanted):
        kind = "EulerDiscreteScheduler"
    own = {
        "PNDMScheduler": {"clip_sample": False},
        "DDIMScheduler": {"clip_sample": False},
        "EulerDiscreteScheduler": {"interpolation_type": "linear", "use_karras_sigmas": False},
    }
    return {
        "_class_name": kind,
        "_diffusers_version": diffusers.__version__,
        **own[kind],
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        **scheduler_config(wanted),
    }


def _fitted_scheduler(model: Family, reference: Path) -> dict[str, Any]:
    """The configuration of the scheduler in a Diffusers folder, for what the model predicts. UserError if its class
    cannot do that, or the folder is no complete one.
    """
    lacking = [name for name in (*_tokenizers(model), _SCHEDULER_FOLDER) if not (reference / name).is_dir()]
    if lacking:
        raise UserError(f"{reference} has no folder {some(lacking)} to copy: give a model of the same family, or none")
    theirs = read_json(reference / SCHEDULER)
    entry = read_json(reference / INDEX).get("scheduler")
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else theirs.get("_class_name")
    wanted = scheduler_config(model.prediction)
    known = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if known is None:
        raise UserError(f"{reference} names no scheduler of Diffusers': give another reference, or none")
    # those that know nothing of an entry would pass over it and step as for another model
    unfit = wanted.keys() - inspect.signature(known.__init__).parameters.keys()
    if unfit or (kind == "DDIMScheduler" and _divides_by_nothing(model.prediction)):
        zero = ", with zero terminal SNR" if model.prediction.zero_terminal_snr else ""
        raise UserError(
            f"{reference} has a {kind}, which cannot step for a model that predicts {model.prediction.kind}{zero}: "
            "give another reference, or none"
        )
    return {**theirs, "_class_name": kind, **wanted}


def _divides_by_nothing(prediction: Prediction) -> bool:
    """Whether DDIM divides the predicted noise by the signal where there is none."""
    return prediction.zero_terminal_snr and prediction.kind == "epsilon"


def _index(model: Family) -> dict[str, Any]:
    """What Diffusers makes of which folder, but for the scheduler. UserError if it can make nothing of the model."""
    channels = model.unet.config.in_channels
    if channels not in model.pipelines:
        raise UserError(
            f"no pipeline of Diffusers' works with nothing but a {model.title} model whose U-Net reads {channels} "
            "channels, so it cannot be written as a folder: write a .safetensors or .ckpt file"
        )
    kind = model.pipelines[channels]
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    taken = inspect.signature(getattr(diffusers, kind).__init__).parameters
    index |= {name: value for name, value in model.pipeline_settings.items() if name in taken}
    for name, (module, _) in model.components().items():
        index[name] = ["transformers" if name.startswith("text_encoder") else "diffusers", type(module).__name__]
    return index | {name: ["transformers", "CLIPTokenizer"] for name in _tokenizers(model)}


def _config(model: Family, name: str, module: torch.nn.Module) -> dict[str, Any]:
    """The configuration of a module of Diffusers."""
    config = json.loads(module.to_json_string())
    config.pop("_name_or_path", None)
    if name == "unet":
        config["sample_size"] = config["sample_size"] or model.picture_size // model.latents.factor
        config["upcast_attention"] = bool(config["upcast_attention"] or model.attention_overflows)
    else:
        config |= {"sample_size": model.picture_size, "scaling_factor": model.latents.scale}
        config["force_upcast"] = bool(config["force_upcast"] or model.vae_overflows)
    return config


def _text_config(module: torch.nn.Module) -> dict[str, Any]:
    """The configuration of a text encoder. The number format in it is what transformers loads the weights in where
    nobody asks for another; Diffusers loads the U-Net in full precision then, and both have to be the same.
    """
    config = json.loads(module.config.to_json_string())
    for name in ("_name_or_path", "dtype", "pad_token_id"):
        config.pop(name, None)
    config["architectures"] = [type(module).__name__]
    config["torch_dtype"] = "float32"
    return config


def _published_name(key: str) -> str:
    """A tensor's name in text encoders as they are published. Version 5 of transformers left out the level `text_model`
    in one of its two classes, and adds it or not as it reads.
    """
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def _tokenizers(model: Family) -> dict[str, Tokenizer]:
    return dict(zip(_TOKENIZERS, model.tokenizers().values(), strict=False))


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """A tokenizer in the form that every version of transformers and other programs read."""
    backend = clip_tokenizer()
    state = json.loads(backend.backend_tokenizer.to_str())["model"]
    vocabulary: Mapping[str, int] = state["vocab"]
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"])
    special = {**_SPECIAL, "pad_token": next(token for token, number in vocabulary.items() if number == tokenizer.pad)}
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    _write(folder / "merges.txt", "".join(f"{line}\n" for line in ("#version: 0.2", *merges)))
    _write_json(folder / "special_tokens_map.json", special)
    # An encoder that pads with id 0 pads with an exclamation mark. transformers would take every one in a prompt for
    # padding; as a word of its own it lets alone at least those that follow a letter.
    added = {
        str(vocabulary[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": token == "!",
            "special": True,
        }
        for token in sorted(set(special.values()))
    }
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": backend.model_max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "added_tokens_decoder": added,
    }
    _write_json(folder / "tokenizer_config.json", settings | special)


def _copy_tokenizer(theirs: Path, folder: Path) -> None:
    """A tokenizer's files without what else lies beside them, or the folder could not be replaced again."""
    folder.mkdir(parents=True)
    for file in theirs.iterdir():
        if file.is_file() and _OWN_FOLDERS[folder.name](file.name):
            shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    _write(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_replaceable(
    folder: Path, keep: Collection[Path] = (), *, others: Others | None = None, kind: str = "model's"
) -> None:
    """UserError if a model's folder must not be written here: there is something else, or something more than a model
    in Diffusers' layout, or what is to `keep`, or no name can be given to the folder. The same for the two folders
    beside it that writing needs: of those only what a killed run left is removed.

    The same for folders of another `kind`, as in a sentence, whose `others` are what does not belong to them.
    """
    strangers = others or _others
    if not folder.resolve().name:
        raise UserError(f"{folder} has no name of its own: choose another name for the {kind} folder")
    lost = {folder.resolve(), *working_names(folder)}
    for path in keep:
        # where it lies and, if that is a link, where it is
        for place in (path.absolute(), path.resolve()):
            if lost & {place, *place.parents}:
                raise UserError(f"{folder}: writing it would remove {path}, choose another name for the {kind} folder")
    if folder.is_file():
        raise UserError(f"{folder} is a file: choose another name for the {kind} folder")
    if folder.is_dir() and (found := strangers(folder)):
        raise UserError(
            f"{folder} is a folder with other things in it ({some(found)}), which would be lost: choose another name "
            f"for the {kind} folder"
        )
    for left in working_names(folder):
        if not os.path.lexists(left):
            continue
        found = strangers(left, unfinished=True) if left.is_dir() and not left.is_symlink() else [left.name]
        if found:
            raise UserError(
                f"{left} is in the way and no unfinished {kind} folder ({some(found)}), it would be lost: move it, or "
                f"choose another name for the {kind} folder"
            )


def _others(folder: Path, *, unfinished: bool = False) -> list[str]:
    """What lies in a folder and is no part of a model in Diffusers' layout. Of an `unfinished` one no part needs to be
    there, and the last file can be half-written.
    """
    try:
        entries = sorted(folder.iterdir())
        if not unfinished and INDEX not in {entry.name for entry in entries}:
            return [entry.name for entry in entries]
        others = []
        for entry in entries:
            if entry.name in _OWN_FOLDERS and entry.is_dir():
                own = _OWN_FOLDERS[entry.name]
                inner = ((file, _whole_name(file, unfinished)) for file in sorted(entry.iterdir()))
                others += [f"{entry.name}/{file.name}" for file, name in inner if not (file.is_file() and own(name))]
            elif not (entry.is_file() and _whole_name(entry, unfinished) in _OWN_FILES):
                others.append(entry.name)
        return others
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def _whole_name(file: Path, unfinished: bool) -> str:
    """A file's name without what `replacing` adds to it until the file is whole."""
    return re.sub(r"\.\d+\.tmp$", "", file.name) if unfinished else file.name
