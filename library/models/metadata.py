"""What saved files tell about themselves: the training's `ss_*`, the look-up hashes `sshs_*`, and `modelspec.*`.

Every value is a string, JSON where nested. `modelspec` is SAI ModelSpec 1.0.1
(github.com/Stability-AI/ModelSpec). Nothing here names a path: only files' and folders' own names go out.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.files.checkpoint import Hashes, hash_tensors
from library.models.noise import Prediction

IMPLEMENTATION_VERSION = "atelier/0.1.0"

# Settings that are written as `ss_<name>`, and what they come to in a program that has no such setting.
_SETTINGS = {
    "adaptive_noise_scale": None,
    "cache_latents": False,
    "caption_dropout_every_n_epochs": 0,
    "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0,
    "clip_skip": None,
    "face_crop_aug_range": None,
    "fp8_base": False,
    "fp8_base_unet": False,
    "full_fp16": False,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "snr",
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "learning_rate": None,
    "loss_type": "l2",
    "lowram": False,
    "lr_scheduler": None,
    "lr_warmup_steps": 0,
    "max_grad_norm": None,
    "max_token_length": None,
    "max_validation_steps": None,
    "min_snr_gamma": None,
    "mixed_precision": "no",
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": None,
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "output_name": None,
    "prior_loss_weight": 1.0,
    "resize_interpolation": None,
    "seed": None,
    "training_comment": None,
    "v2": False,
    "validate_every_n_epochs": None,
    "validate_every_n_steps": None,
    "validation_seed": None,
    "validation_split": 0.0,
    "zero_terminal_snr": False,
}
_NETWORK_SETTINGS = {
    "network_alpha": 1,
    "network_dim": None,
    "network_dropout": None,
    "network_module": None,
    "scale_weight_norms": None,
    "text_encoder_lr": None,
    "unet_lr": None,
}
_EMBEDDING_SETTINGS = {
    "init_word": None,
    "num_vectors_per_token": 1,
    "token_string": None,
    "use_object_template": False,
    "use_style_template": False,
}
# Dataset options that have no place of their own where `ss_datasets` lists the datasets.
_SUBSET_SETTINGS = {"color_aug": False, "random_crop": False}
# What a reader needs to use a file; all that is left with --no_metadata.
ESSENTIAL = (
    "ss_base_model_version",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_module",
    "ss_num_vectors_per_token",
    "ss_token_string",
    "ss_v2",
)


@dataclass(frozen=True)
class BaseModel:
    """The model that was trained on. `name` is its file's name, `architecture` ModelSpec's word for it; `vae` is the
    name of the file of another autoencoder, if it was given one.
    """

    name: str
    version: str
    architecture: str
    prediction: Prediction
    hashes: Hashes | None = None
    vae: str | None = None
    vae_hashes: Hashes | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a run knows besides its settings. `datasets` are the `ss_*` fields that describe the data, as plain values;
    `resolution` is (width, height). Times are seconds since 1970. `steps` and `epoch` are those done when the file is
    written; `total_batch_size` is images per optimizer step.
    """

    base: BaseModel
    datasets: Mapping[str, Any]
    resolution: tuple[int, int]
    optimizer: str
    session_id: int
    started_at: float
    finished_at: float
    steps: int
    max_train_steps: int
    epoch: int
    num_epochs: int
    total_batch_size: int


def network_metadata(settings: Mapping[str, Any], run: RunFacts) -> dict[str, str]:
    """Everything that is written into a network's file, but for its hashes.

    `settings` are the flags' effective values by name (the rank used, the seed drawn); `network_args` is the mapping
    that they come to, `base_weights` names of files and how strongly they were merged; these appear only if there are
    any. With `no_metadata`, only what a reader needs.
    """
    fields = training_metadata(settings, run)
    own = {name: settings.get(name, default) for name, default in _NETWORK_SETTINGS.items()}
    if isinstance(own["text_encoder_lr"], tuple) and len(own["text_encoder_lr"]) < 2:  # as when it took one number
        own["text_encoder_lr"] = next(iter(own["text_encoder_lr"]), None)
    fields |= {f"ss_{name}": _text(value) for name, value in own.items()}
    if settings.get("network_args"):
        own = {name: _without_place(value) for name, value in settings["network_args"].items()}
        fields["ss_network_args"] = json.dumps(own)
    if settings.get("base_weights"):
        fields["ss_base_weights"] = json.dumps(settings["base_weights"])
    if settings.get("no_metadata"):
        fields = {name: fields[name] for name in ESSENTIAL if name in fields}
    return fields | modelspec(settings, run, "lora")


def embedding_metadata(settings: Mapping[str, Any], run: RunFacts) -> dict[str, str]:
    """Everything that is written into a Textual Inversion's file; for `settings` see `network_metadata`."""
    own = {name: settings.get(name, default) for name, default in _EMBEDDING_SETTINGS.items()}
    fields = training_metadata(settings, run) | {f"ss_{name}": _text(value) for name, value in own.items()}
    if settings.get("no_metadata"):
        fields = {name: fields[name] for name in ESSENTIAL if name in fields}
    return fields | modelspec(settings, run, "textual-inversion")


def training_metadata(settings: Mapping[str, Any], run: RunFacts) -> dict[str, str]:
    """The `ss_*` fields that any kind of training has; for `settings` see `network_metadata`."""
    own = _SETTINGS if "ss_datasets" in run.datasets else _SETTINGS | _SUBSET_SETTINGS
    fields = {
        **{name: settings.get(name, default) for name, default in own.items()},
        "base_model_version": run.base.version,
        "debiased_estimation": settings.get("debiased_estimation_loss", False),
        "epoch": run.epoch,
        "max_train_steps": run.max_train_steps,
        "num_epochs": run.num_epochs,
        "optimizer": run.optimizer,
        "sd_model_name": run.base.name,
        "sd_scripts_commit_hash": commit_hash(),
        "session_id": run.session_id,
        "steps": run.steps,
        "total_batch_size": run.total_batch_size,
        "training_finished_at": run.finished_at,
        "training_started_at": run.started_at,
    }
    if run.base.hashes is not None:
        fields |= {"sd_model_hash": run.base.hashes.legacy, "new_sd_model_hash": run.base.hashes.sha256}
    if run.base.vae is not None:
        fields["vae_name"] = run.base.vae
    if run.base.vae_hashes is not None:
        fields |= {"vae_hash": run.base.vae_hashes.legacy, "new_vae_hash": run.base.vae_hashes.sha256}
    data = {name: _text(value) for name, value in run.datasets.items()}
    if data.get("ss_bucket_info") == "None":
        data["ss_bucket_info"] = "null"  # there is none without bucketing, but readers expect JSON all the same
    return {f"ss_{name}": _text(value) for name, value in fields.items()} | data


def modelspec(settings: Mapping[str, Any], run: RunFacts, kind: str = "") -> dict[str, str]:
    """The `modelspec.*` fields; `kind` is "" for a full model, else "lora" or "textual-inversion"."""
    width, height = run.resolution
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{run.base.architecture}/{kind}" if kind else run.base.architecture,
        "implementation": "diffusers",
        "implementation_version": IMPLEMENTATION_VERSION,
        "title": settings.get("output_name") or "last",
        "resolution": f"{width}x{height}",
        "date": datetime.fromtimestamp(int(run.finished_at), UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "prediction_type": "v" if run.base.prediction.kind == "v_prediction" else "epsilon",
    }
    described = {
        name.removeprefix("metadata_"): value for name, value in settings.items() if name.startswith("metadata_")
    }
    fields |= {name: str(value) for name, value in described.items() if value}
    return {f"modelspec.{name}": value for name, value in fields.items()}


def network_hashes(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> dict[str, str]:
    """The `sshs_*` fields of a network's file, where it `stores_metadata`. They are those of the file with its `ss_*`
    metadata alone, so that adding a title later does not change them.
    """
    own = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    hashes = hash_tensors(tensors, dtype, own)
    return {"sshs_model_hash": hashes.sha256, "sshs_legacy_hash": hashes.legacy}


@lru_cache(maxsize=1)
def commit_hash() -> str:
    """This program's git commit, or "(unknown)" where it was not installed with git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "(unknown)"
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"


def _without_place(value: Any) -> Any:
    """The name alone of a file or folder that is there."""
    return os.path.basename(os.path.abspath(value)) if isinstance(value, str) and os.path.exists(value) else value


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
