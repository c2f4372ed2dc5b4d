"""What can be known to be wrong before torch is imported and anything is loaded. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from library import console
from library.data.config import BOTH_KINDS, DatasetConfig, check_combinations, load_datasets
from library.errors import UserError, suggest_path
from library.generation.prompts import PromptLine, read_prompts
from library.models.files.hub import looks_like_hub_id
from library.options.base import Settings
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from library.options.logging import LogOptions
from library.options.model import ModelOptions
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.suffixes import WEIGHTS_SUFFIXES


@dataclass(frozen=True)
class Plans:
    """What the settings come to: what is trained on, where it goes and what is painted meanwhile."""

    datasets: tuple[DatasetConfig, ...]
    output_dir: Path
    prompts: tuple[PromptLine, ...]


def check(settings: Settings, *, trains_text_encoder: bool, kinds: frozenset[str] = BOTH_KINDS) -> Plans:
    """UserError for the first mistake found in the settings and the files they name.

    `kinds` of subsets are what the script takes.
    """
    check_model(settings[ModelOptions])
    datasets = load_datasets(settings[DatasetOptions], settings.given, kinds)
    check_combinations(datasets, settings[CacheOptions], trains_text_encoder)
    prompts = check_prompts(settings[PreviewOptions])
    if settings[LogOptions].logging_dir is not None:
        make_writable("--logging_dir", settings[LogOptions].logging_dir)
    if settings[SaveOptions].output_dir is None:
        raise UserError("nowhere to save: give --output_dir a folder")
    return Plans(datasets, make_writable("--output_dir", settings[SaveOptions].output_dir), prompts)


def check_caching(settings: Settings, caching: CacheOptions) -> tuple[DatasetConfig, ...]:
    """The datasets for which a tool fills the caches of `caching`; UserError as above."""
    check_model(settings[ModelOptions])
    datasets = load_datasets(settings[DatasetOptions], settings.given)
    check_combinations(datasets, caching, trains_text_encoder=False)
    return datasets


def check_model(options: ModelOptions) -> None:
    """A model must be named, and be there or look like one of the hub. What is in it is looked at later."""
    path = options.pretrained_model_name_or_path
    if not path:
        raise UserError(
            "no model to train on: give --pretrained_model_name_or_path a .safetensors or .ckpt file, a Diffusers "
            "folder, or owner/name of the hub"
        )
    for flag, name in (("--pretrained_model_name_or_path", path), ("--vae", options.vae)):
        if name and not os.path.exists(name) and not looks_like_hub_id(name):
            raise UserError(f"{flag}: {name} does not exist{suggest_path(Path(name), WEIGHTS_SUFFIXES)}")
    if options.tokenizer_cache_dir:
        console.notice("--tokenizer_cache_dir has no effect: the tokenizers come with this program")


def make_writable(flag: str, name: str) -> Path:
    """Make a folder that is written to later, and try it."""
    folder = Path(name)
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag}: {folder} cannot be written to ({error.strerror})") from error
    return folder


def check_prompts(options: PreviewOptions) -> tuple[PromptLine, ...]:
    """The prompts to paint; none where no preview is due."""
    wanted = options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs
    if wanted and options.sample_prompts is None:
        raise UserError("previews are asked for, but no prompts: give --sample_prompts a file of them")
    if options.sample_prompts is None or not wanted:
        return ()
    return read_prompts(options.sample_prompts)
