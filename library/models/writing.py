"""Whole models on the disk, in the formats of --save_model_as."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from library.models.diffusers_writer import write_folder
from library.models.family import Family
from library.models.files.weights_file import overflows
from library.suffixes import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX

SINGLE_FILES = {"ckpt": ".ckpt", "pt": ".pt", "safetensors": SAFETENSORS_SUFFIX}
FOLDERS = {"diffusers": False, "diffusers_safetensors": True}  # whether its weights are .safetensors


def format_of(path: Path) -> str:
    """The format, as --save_model_as has it, in which a model lies at `path`."""
    if path.is_dir():
        pickled = any(path.glob(f"unet/*{suffix}") for suffix in PICKLE_SUFFIXES)
        return "diffusers" if pickled and not any(path.glob("unet/*.safetensors")) else "diffusers_safetensors"
    return path.suffix.lower().removeprefix(".") if path.suffix.lower() in (".ckpt", ".pt") else "safetensors"


def place_of(stem: Path, kind: str) -> Path:
    """The file or folder that a model is written as: `stem` with the ending of its format `kind`."""
    return stem if kind in FOLDERS else stem.with_name(stem.name + SINGLE_FILES[kind])


def write_model(
    model: Family,
    stem: Path,
    kind: str,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model in `dtype`, or as it is, at the `place_of` its format; returns the file or folder, which appears
    under its name only when it is whole. UserError if the place cannot be written.
    """
    path = place_of(stem, kind)
    if kind in FOLDERS:
        write_folder(model, path, dtype, safetensors=FOLDERS[kind], metadata=metadata)
    else:
        model.save(path, dtype, metadata)
    return path


def overflowing(module: nn.Module, dtype: torch.dtype | None) -> list[str]:
    """The names of the parameters and buffers with a finite number that is none in `dtype`."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if overflows(tensor, dtype)]
