"""What a run is made of, as its states tell it, and what it means when a resumed run is made of something else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import accelerate
import torch

from library.console import warn
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.errors import some
from library.models.metadata import IMPLEMENTATION_VERSION
from library.options.base import Settings, options_of
from library.options.config import ConfigOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.distributed import DistributedOptions
from library.options.huggingface import HubOptions
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions
from library.options.metadata import MetadataOptions
from library.options.network import NetworkOptions
from library.options.preview import PreviewOptions
from library.options.rehearsal import RehearsalOptions
from library.options.resume import ResumeOptions
from library.options.saving import SaveOptions
from library.options.textual_inversion import TextualInversionOptions
from library.options.validation import ValidationOptions
from library.training.device import engines
from library.training.logs import Continued
from library.training.methods.base import Method, ParameterGroup
from library.training.optimization.optimizers import name_of
from library.training.shared_scan import digest
from library.training.trackers import public_value

if TYPE_CHECKING:
    from library.training.outlook import Outlook

# Groups whose options do not change what is learned.
_BESIDES = (
    ConfigOptions,
    ConsoleOptions,
    DistributedOptions,
    HubOptions,
    LoaderOptions,
    LogOptions,
    MetadataOptions,
    PreviewOptions,
    RehearsalOptions,
    ResumeOptions,
    SaveOptions,
    ValidationOptions,
)
# Options that name places: what is there has a fingerprint of its own.
_PLACES = {
    "pretrained_model_name_or_path",
    "vae",
    "tokenizer_cache_dir",
    "train_data_dir",
    "reg_data_dir",
    "in_json",
    "dataset_config",
    "conditioning_data_dir",
    "base_weights",
    "base_weights_multiplier",
}
# Said elsewhere, or without an effect on what is learned.
_NOT_COMPARED = {
    "max_train_steps",
    "max_train_epochs",
    "learning_rate",
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "block_lr",
    "unet_lr",
    "text_encoder_lr",
    "optimizer_type",
    "use_8bit_adam",
    "use_lion_optimizer",
    "seed",
    "cache_info",
    "debug_dataset",
    "skip_cache_check",
    "recache_unknown",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs_to_disk",
    "save_model_as",
    "use_safetensors",
    "cpu_offload_checkpointing",
    "sdpa",
    "lowram",
    "highvram",
}
# Options that decide which parts of a model are trained.
_PARTS = (
    "train_text_encoder",
    "stop_text_encoder_training",
    "learning_rate",
    "learning_rate_te",
    "learning_rate_te1",
    "learning_rate_te2",
    "block_lr",
)
_OTHER_IMAGES = "so the images of each step are others from here on"
_OTHER_CURVE = "so the learning rate follows the new curve from here on"
_ROUNDINGS = "so it computes with other roundings from here on"
_READ_OTHERWISE = "so captions are read in another way than for what was learned before"
_OTHER_AIM = "so the model is trained towards something else than before"
_OTHER_NOISE = "so noise is drawn in another way from here on"
_OTHER_TIMESTEPS = "so other timesteps are trained from here on"
_OTHER_LOSS = "so losses do not compare with those of before"
_HAS_BEGUN = "which has no effect: the vectors go on as they are in the state"
_ROUNDED = "so roundings differ from those of a run without a break"
_FROZEN = "so what is trained meets frozen weights that are rounded otherwise from here on"
_OTHER_CLIPPING = "so gradients are clipped in other parts from here on"
_MEANING = {
    "train_batch_size": _OTHER_IMAGES,
    "gradient_accumulation_steps": _OTHER_IMAGES,
    "lr_scheduler": _OTHER_CURVE,
    "lr_scheduler_type": _OTHER_CURVE,
    "lr_scheduler_args": _OTHER_CURVE,
    "lr_scheduler_num_cycles": _OTHER_CURVE,
    "lr_scheduler_power": _OTHER_CURVE,
    "lr_scheduler_timescale": _OTHER_CURVE,
    "lr_scheduler_min_lr_ratio": _OTHER_CURVE,
    "lr_warmup_steps": _OTHER_CURVE,
    "lr_decay_steps": _OTHER_CURVE,
    "mixed_precision": _ROUNDINGS,
    "full_fp16": _ROUNDINGS,
    "full_bf16": _ROUNDINGS,
    "deterministic": _ROUNDINGS,
    "gradient_checkpointing": _ROUNDINGS,
    "no_half_vae": _ROUNDINGS,
    "fp8_base": _FROZEN,
    "fp8_base_unet": _FROZEN,
    "xformers": _ROUNDINGS,
    "diffusers_xformers": _ROUNDINGS,
    "mem_eff_attn": _ROUNDINGS,
    "torch_compile": _ROUNDINGS,
    "dynamo_backend": _ROUNDINGS,
    "cache_latents": _ROUNDINGS,
    "vae_batch_size": _ROUNDINGS,
    "cache_text_encoder_outputs": _ROUNDINGS,
    "text_encoder_batch_size": _ROUNDINGS,
    "clip_skip": _READ_OTHERWISE,
    "max_token_length": _READ_OTHERWISE,
    "weighted_captions": _READ_OTHERWISE,
    "no_token_padding": _READ_OTHERWISE,
    "stop_text_encoder_training": "so the text encoder is trained in other steps than before",
    "v_parameterization": _OTHER_AIM,
    "zero_terminal_snr": _OTHER_AIM,
    **dict.fromkeys(
        (
            "noise_offset",
            "noise_offset_random_strength",
            "adaptive_noise_scale",
            "multires_noise_iterations",
            "multires_noise_discount",
            "ip_noise_gamma",
            "ip_noise_gamma_random_strength",
        ),
        _OTHER_NOISE,
    ),
    **dict.fromkeys(
        ("min_timestep", "max_timestep", "timestep_distribution", "logit_mean", "logit_std"), _OTHER_TIMESTEPS
    ),
    **dict.fromkeys(
        (
            "loss_type",
            "huber_schedule",
            "huber_c",
            "huber_scale",
            "min_snr_gamma",
            "scale_v_pred_loss_like_noise_pred",
            "v_pred_like_loss",
            "debiased_estimation_loss",
            "masked_loss_normalize",
        ),
        _OTHER_LOSS,
    ),
    "fused_backward_pass": _OTHER_CLIPPING,
    "fused_optimizer_groups": _OTHER_CLIPPING,
    "optimizer_args": "but the optimizer keeps the old ones, which are in its state",
    "token_string": _READ_OTHERWISE,
    "use_object_template": _READ_OTHERWISE,
    "use_style_template": _READ_OTHERWISE,
    "init_word": _HAS_BEGUN,
    "weights": _HAS_BEGUN,
    "network_weights": "which has no effect: the network goes on as it is in the state",
    "ema": "so the moving average of the weights begins or ends here",
}
_FACTS = {
    "dataset": f"the images of the datasets or their sizes have changed, {_OTHER_IMAGES}",
    "captions": "captions have changed, which counts from here on",
    "base_model": "the base model is another one, which what was learned beside the old one may not fit",
    "base_weights": "the base weights are others, which what was learned upon the old ones may not fit",
    "device": f"the device is another one, {_ROUNDED}",
}
_NUMBERED_FACTS = {
    "world": f"the number of processes is {{now}} and was {{before}}, {_OTHER_IMAGES}",
    "threads": f"the number of threads is {{now}} and was {{before}}, {_ROUNDED}",
    "torch": f"PyTorch is {{now}} and was {{before}}, {_ROUNDED}",
    "steps_per_epoch": "the number of steps in an epoch is {now} and was {before}, so the run goes on in epoch {epoch}",
}


def facts(
    run: "Outlook",
    method: Method,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[ParameterGroup],
    log: Continued,
) -> dict[str, Any]:
    """What a run is made of, without anything private: places and secrets are left out. `log`: how to go on with it."""
    return {
        "output_name": run.target.name,
        "seed": run.seed,
        "log": log,
        "settings": comparable(run.settings) | method.settled(),
        "settled": method.settled(),
        "optimizer": name_of(optimizer),
        "groups": [group.name for group in groups],
        "images_per_epoch": run.plan.images_per_epoch,
        "steps_per_epoch": run.plan.steps_per_epoch,
        "dataset": digest(run.table),
        "captions": _captions(run.table),
        "dataset_options": _dataset_options(run.plans.datasets),
        "base_model": run.info.identity,
        "base_weights": [network.fingerprint for network in run.base_networks],
        "engine": engines.engine(run.accelerator),
        "world": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": run.accelerator.device.type,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "program": IMPLEMENTATION_VERSION,
    }


def comparable(settings: Settings) -> dict[str, Any]:
    """The options that shape what is learned, as JSON has them; of paths in them the last part only."""
    shaping = {kind: group for kind, group in settings.groups.items() if kind not in _BESIDES}
    values = Settings(shaping, settings.given).flat()
    return {name: public_value(value) for name, value in values.items() if name not in _PLACES}


def _captions(table: RecordTable) -> str:
    """A hash of all captions."""
    sums = hashlib.blake2b(digest_size=16)
    for index in range(len(table)):
        sums.update(table.caption(index).encode() + b"\0")
    return sums.hexdigest()


def _dataset_options(datasets: Sequence[DatasetConfig]) -> str:
    """A hash of the datasets' options but for places."""
    nowhere = {"image_dir": None, "metadata_file": None, "conditioning_data_dir": None, "cache_info": None, "place": ""}
    options = [
        {**asdict(dataset), "place": "", "subsets": [{**asdict(subset), **nowhere} for subset in dataset.subsets]}
        for dataset in datasets
    ]
    content = json.dumps(options, default=str, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def say_differences(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Tell the user what is no longer as it was in the state of this step, and what that means."""
    if "seed" in before and before["seed"] != now["seed"]:
        warn(f"--seed is {now['seed']} and was {before['seed']}, so all random choices are others from here on")
    before = {"base_weights": [], **before}  # which older states do not tell
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    settings = _changed_settings(before, now)
    for name, meaning in _FACTS.items():
        if name in changed:
            warn(meaning)
    for name, meaning in _NUMBERED_FACTS.items():
        if name in changed:
            warn(meaning.format(now=now[name], before=before[name], epoch=step // now["steps_per_epoch"] + 1))
    if "dataset_options" in changed and not settings & {option.name for option in options_of(DatasetOptions)}:
        warn("options of the datasets have changed, which counts from here on")
    if "optimizer" in changed:
        warn(
            f"the optimizer is {now['optimizer']} and was {before['optimizer']}, so it starts anew, with the learning "
            "rates and arguments of this command line"
        )
        settings -= {"optimizer_args"}
    for name in sorted(settings):
        warn(f"{_difference(name, before, now)}, {_MEANING.get(name, 'which counts from here on')}")


def require_same_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError if one of several new words is another than in a state: each has vectors of its own there. A single
    word may get another name.
    """
    names = [facts.get("settings", {}).get("token_string") or "" for facts in (before, now)]
    old, new = ([word.strip() for word in words.split(",")] for words in names)
    if all(names) and old != new and max(len(old), len(new)) > 1:
        raise ValueError("its words are others")


def what_does_not_fit(before: Mapping[str, Any], now: Mapping[str, Any], problem: ValueError) -> str:
    """Why a state is not of what is trained: in the words of flags if their values differ, else the `problem`."""
    kinds = [_kind(facts.get("settings", {})) for facts in (before, now)]
    if before and kinds[0] != kinds[1]:
        return f"it is of {kinds[0]}, not of {kinds[1]}"
    own = {option.name for group in (NetworkOptions, TextualInversionOptions) for option in options_of(group)}
    differing = [_difference(name, before, now) for name in sorted(_changed_settings(before, now) & own)]
    if differing:
        return ", ".join(differing)
    parts = other_groups(before, now)
    if not parts:
        return str(problem)
    return ", ".join([parts, *(_difference(name, before, now) for name in _PARTS if _decides(name, before, now))])


def other_groups(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which parts of a model one of two runs trains and the other does not, as in a sentence; nothing if they are the
    same, or not known.
    """
    theirs, ours = before.get("groups"), now.get("groups")
    if not theirs or not ours:
        return ""
    gone, new = ([name for name in one if name not in other] for one, other in ((theirs, ours), (ours, theirs)))
    said = [f"it trains {some(gone)} besides"] * bool(gone) + [f"it does not train {some(new)}"] * bool(new)
    return " and ".join(said)


def _kind(settings: Mapping[str, Any]) -> str:
    """What a run of these settings trains."""
    if "token_string" in settings:
        return "a new word"
    return "a network" if "network_module" in settings else "the model itself"


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """The options that both know, that matter and that differ."""
    old, new = before.get("settings", {}), now["settings"]
    unclipped = set() if new.get("max_grad_norm") else {"fused_backward_pass", "fused_optimizer_groups"}
    compared = (old.keys() & new.keys()) - _NOT_COMPARED - unclipped
    return {name for name in compared if _differs(name, before, now)}


def _differs(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an option that both know has another value."""
    old, new = before.get("settings", {}), now["settings"]
    return name in old and name in new and public_value(old[name]) != new[name]


def _decides(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether other parts are trained because of this option, for all that is known. Of single rates, 0 alone does."""
    values = [facts.get("settings", {}).get(name) for facts in (before, now)]
    return _differs(name, before, now) and (0 in values or not name.startswith("learning_rate"))


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"--{name} is {_shown(now['settings'][name])} and was {_shown(before['settings'][name])}"


def _shown(value: Any) -> str:
    return "not set" if value is None or value is False or value == "" else "set" if value is True else str(value)
