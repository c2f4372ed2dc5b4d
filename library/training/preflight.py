"""What can be known to be wrong before torch is imported and anything is loaded. Imports no torch."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library import console
from library.data.config import (
    BOTH_KINDS,
    DatasetConfig,
    check_combinations,
    load_datasets,
    preserved_subset,
    with_alpha_masks,
)
from library.data.config_values import PRESERVES
from library.errors import UserError, suggest_path
from library.generation.prompts import PromptLine, read_prompts
from library.hub import looks_like_hub_id
from library.options.attention import AttentionOptions
from library.options.base import MethodOptions, Settings
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from library.options.full_model import FullModelOptions
from library.options.huggingface import HubOptions
from library.options.logging import LogOptions
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.objective import ObjectiveOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.rehearsal import RehearsalOptions
from library.options.resume import ResumeOptions
from library.options.saving import SaveOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions
from library.suffixes import WEIGHTS_SUFFIXES
from library.training.hub import check_hub, download_state
from library.training.resuming import states
from library.training.trackers import check_trackers

_RELICS = {
    "tokenizer_cache_dir": "the tokenizers come with this program",
    "persistent_data_loader_workers": "the processes that read images always last the whole run",
    "disable_mmap_load_safetensors": "model files are never mapped into memory",
}


@dataclass(frozen=True)
class Plans:
    """What the settings come to: what is trained on, where it goes and what is painted meanwhile."""

    datasets: tuple[DatasetConfig, ...]
    output_dir: Path
    prompts: tuple[PromptLine, ...]
    resume: states.StateFolder | None = None
    """The state that the run goes on with, as the first process has found it."""


def check(settings: Settings, *, trains_text_encoder: bool, kinds: frozenset[str] = BOTH_KINDS) -> Plans:
    """UserError for the first mistake found in the settings and the files they name.

    `kinds` of subsets are what the script takes.
    """
    saving, resuming, dry = settings[SaveOptions], settings[ResumeOptions], settings[RehearsalOptions].dry_run
    saves_states = saving.save_state or saving.save_state_on_train_end
    check_hub(settings[HubOptions], resuming.resume, saves_states=saves_states)
    tell_of_relics(settings)
    check_fused(settings)
    settings[MetadataOptions].described()  # its picture is looked at
    check_model(settings[ModelOptions])
    check_memory(settings)
    for group in settings.groups.values():
        if isinstance(group, MethodOptions):
            group.check(settings)
    datasets = load_datasets(settings[DatasetOptions], settings.given, kinds)
    check_combinations(datasets, settings[CacheOptions], trains_text_encoder)
    check_preservation(settings, datasets)
    masked = settings[DatasetOptions].masked_loss or with_alpha_masks(datasets)
    settings[ObjectiveOptions].check(settings[ModelOptions], masked=masked)
    if dry:
        datasets = tuple(without_index(dataset) for dataset in datasets)
    held_out = any(subset.validation_split > 0 for dataset in datasets for subset in dataset.subsets)
    settings[ValidationOptions].check(held_out)
    prompts = check_prompts(settings[PreviewOptions])
    check_trackers(settings[LogOptions])
    if settings[LogOptions].logging_dir is not None:
        make_writable("--logging_dir", settings[LogOptions].logging_dir, make=not dry)
    if saving.output_dir is None:
        raise UserError("nowhere to save: give --output_dir a folder")
    output_dir = make_writable("--output_dir", saving.output_dir, make=not dry)
    return Plans(datasets, output_dir, prompts, find_state(settings, output_dir))


def check_fused(settings: Settings) -> None:
    """UserError where weights that move within the backward pass contradict other flags."""
    fused = settings[MemoryOptions].fused
    if fused is None:
        return
    if settings[TrainingOptions].gradient_accumulation_steps > 1:
        raise UserError(
            f"{fused} keeps no gradients that further micro-batches could add to: drop it, or "
            "--gradient_accumulation_steps"
        )
    if settings[PrecisionOptions].mixed_precision == "fp16":
        raise UserError(
            f"{fused} moves weights before it is known whether fp16 gradients have overflowed: drop it, or use "
            "--mixed_precision bf16"
        )


def check_preservation(settings: Settings, datasets: Sequence[DatasetConfig]) -> None:
    """UserError for subsets that are to keep what the model says of them, where it is the model that is trained."""
    marked = preserved_subset(datasets)
    if marked and NetworkOptions not in settings.groups:
        raise UserError(
            f"{marked.where('custom_attributes')}: {PRESERVES} needs a network beside the model that can be switched "
            "off, which this script does not train: leave it out, and use regularisation images (is_reg) instead"
        )


def find_state(settings: Settings, output_dir: Path) -> states.StateFolder | None:
    """The state to go on with; the first process alone looks, and tidies up what a killed run has left."""
    if console.rank() != 0:
        return None
    name, wanted = settings[SaveOptions].name, settings[ResumeOptions].resume
    if not settings[RehearsalOptions].dry_run:
        states.tidy(output_dir, name)
        forget_requests(states.control_file(output_dir, name))
    if not wanted or (wanted == states.LATEST and not output_dir.exists()):
        return None
    if settings[HubOptions].resume_from_huggingface:
        wanted = str(download_state(wanted, settings[HubOptions]))
    return states.find(wanted, output_dir, name, only_looks=settings[RehearsalOptions].dry_run)


def forget_requests(control_file: Path) -> None:
    """Whatever is in the control file now was meant for a run before this one."""
    if control_file.exists():
        console.notice(f"{control_file} is from before this run and is removed")
        control_file.unlink()


def check_caching(settings: Settings, caching: CacheOptions) -> tuple[DatasetConfig, ...]:
    """The datasets for which a tool fills the caches of `caching`; UserError as above."""
    tell_of_relics(settings)
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


def tell_of_relics(settings: Settings) -> None:
    """Say which flags ask for what cannot be otherwise any more."""
    values = settings.flat()
    for name, reason in _RELICS.items():
        if values.get(name):
            console.notice(f"--{name} has no effect: {reason}")


def check_memory(settings: Settings) -> None:
    """Options of memory and speed that need others. UserError for weights of 8 bits, which make sense in half precision
    only; what has no effect by itself is said.
    """
    precision, memory = settings[PrecisionOptions], settings[MemoryOptions]
    trains_model = any(issubclass(group, FullModelOptions) for group in settings.groups)
    if not trains_model and precision.mixed_precision == "no":
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(precision, name):
                raise UserError(
                    f"--{name} computes in half precision: add --mixed_precision bf16 or fp16, or drop --{name}"
                )
    if memory.cpu_offload_checkpointing and not memory.gradient_checkpointing:
        console.notice("--cpu_offload_checkpointing has no effect without --gradient_checkpointing")
    if "dynamo_backend" in settings.given and not settings[AttentionOptions].torch_compile:
        console.notice("--dynamo_backend has no effect without --torch_compile")


def without_index(dataset: DatasetConfig) -> DatasetConfig:
    """The same dataset, beside whose images nothing is kept."""
    return replace(dataset, subsets=tuple(replace(subset, cache_info=False) for subset in dataset.subsets))


def make_writable(flag: str, name: str, *, make: bool = True) -> Path:
    """Make a folder that is written to later, and try it; without `make`, try the one that it would be made in."""
    folder = Path(name)
    tried = folder if make else next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tried.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=tried).close()  # which has no name that could be left
    except OSError as error:
        raise UserError(f"{flag}: {tried} cannot be written to ({error.strerror})") from error
    return folder


def check_prompts(options: PreviewOptions) -> tuple[PromptLine, ...]:
    """The prompts to paint. Where no preview is due, one may be asked for in the course of the run, which is said."""
    wanted = options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs
    if wanted and options.sample_prompts is None:
        raise UserError("previews are asked for, but no prompts: give --sample_prompts a file of them")
    if options.sample_prompts is not None and not wanted:
        console.notice(
            "--sample_prompts: previews are painted on request only without --sample_every_n_steps, "
            "--sample_every_n_epochs or --sample_at_first"
        )
    return () if options.sample_prompts is None else read_prompts(options.sample_prompts)
