"""Models written as Diffusers folders, complete without anything that would have to be downloaded."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch

from library.errors import UserError, some
from library.models.family import Family
from library.models.files.checkpoint import write_tensors
from library.models.files.diffusers_folder import read_json
from library.models.files.folder_files import CONFIG, INDEX, ORIGINAL_LAYOUT, SCHEDULER, weights_file_name
from library.models.noise import Prediction, scheduler_config
from library.models.text import Tokenizer, clip_tokenizer

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

    What the layout has no place for goes into `original_layout.safetensors`. It is written as `<folder>.tmp` and takes
    the place of an older model's folder when it is whole. Tokenizers and scheduler are copied from the Diffusers folder
    `reference` if one is given. UserError if the place cannot be written or is in use, or the reference lacks them.
    """
    metadata = {name: text for name, text in (metadata or {}).items() if "hash" not in name}  # those of a whole file
    own = [*_tokenizers(model), SCHEDULER.split("/")[0]]
    if reference is not None and (lacking := [name for name in own if not (reference / name).is_dir()]):
        raise UserError(f"{reference} has no folder {some(lacking)} to copy: give a model of the same family, or none")
    with _replacing(Path(folder)) as temporary:
        for name, (module, _) in model.components().items():
            text = name.startswith("text_encoder")
            target = temporary / name
            _write_json(target / CONFIG, _text_config(module) if text else _config(model, name, module))
            state = module.state_dict()
            tensors = {_published_name(key): tensor for key, tensor in state.items()} if text else state
            file = target / weights_file_name(name, safetensors=safetensors)
            # transformers refuses files that do not say which library's tensors they are
            write_tensors(file, tensors, dtype, {"format": "pt", **metadata}, content_hash=True)
        index = _index(model)
        if reference is not None:
            for name in own:
                shutil.copytree(reference / name, temporary / name)
            theirs = read_json(reference / INDEX)
            index |= {name: theirs[name] for name in own if name in theirs}
        else:
            for name, tokenizer in _tokenizers(model).items():
                _write_tokenizer(temporary / name, tokenizer)
            _write_json(temporary / SCHEDULER, scheduler(model))
        if model.carried:
            write_tensors(temporary / ORIGINAL_LAYOUT, model.carried, dtype, content_hash=True)
        _write_json(temporary / INDEX, index)


def scheduler(model: Family) -> dict[str, Any]:
    """The configuration of the scheduler a model is published with: that of its family, or one that can step as the
    model predicts.
    """
    wanted: Prediction = model.prediction
    kind = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler"}.get(model.name, "EulerDiscreteScheduler")
    if kind == "PNDMScheduler" and wanted.kind == "v_prediction":
        kind = "DDIMScheduler"
    if wanted.zero_terminal_snr and wanted.kind == "epsilon":
        kind = "EulerDiscreteScheduler"  # DDIM divides the noise by the signal, of which there is none at the end
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


def _index(model: Family) -> dict[str, Any]:
    """What Diffusers makes of which folder."""
    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": diffusers.__version__}
    if model.pipeline == "StableDiffusionXLPipeline":
        # Our own pictures and those of web UIs are painted with the empty negative prompt encoded, not with zeros.
        index["force_zeros_for_empty_prompt"] = False
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    else:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    for name, (module, _) in model.components().items():
        index[name] = ["transformers" if name.startswith("text_encoder") else "diffusers", type(module).__name__]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in _tokenizers(model)}
    index["scheduler"] = ["diffusers", scheduler(model)["_class_name"]]
    return index


def _config(model: Family, name: str, module: torch.nn.Module) -> dict[str, Any]:
    """The configuration of a module of Diffusers."""
    config = json.loads(module.to_json_string())
    config.pop("_name_or_path", None)
    width = config["sample_size"] if name == "unet" else None
    predicts_v = model.name == "sd2" and model.prediction.kind == "v_prediction"
    size = 768 if predicts_v else model.latents.default_size
    if name == "unet":
        config["sample_size"] = width or size // model.latents.factor
        # the attention of Stable Diffusion 2.1 overflows in half precision
        config["upcast_attention"] = bool(config["upcast_attention"] or predicts_v)
    else:
        config |= {"sample_size": size, "scaling_factor": model.latents.scale}
        if model.name == "sdxl":
            config["force_upcast"] = True  # its autoencoder overflows in half precision
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
    return dict(zip(("tokenizer", "tokenizer_2"), model.tokenizers().values(), strict=False))


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


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    _write(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends without an error and not before."""
    temporary, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.replaced.tmp")
    if folder.is_file():
        raise UserError(f"{folder} is a file: choose another name for the model's folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise UserError(f"{folder} is a folder with other things in it: choose another name for the model's folder")
    try:
        if old.exists() and not folder.exists():  # a run was killed between the two renamings below
            os.replace(old, folder)
        for left in (temporary, old):
            if left.exists():
                shutil.rmtree(left)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            if old.exists() and not folder.exists():
                os.replace(old, folder)
        if isinstance(error, OSError):
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
