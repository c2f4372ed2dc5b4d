"""Training a network (LoRA or a relative) beside a frozen model.

`NetworkMethod` is the one place that knows how network modules, ours and other people's, want to be called. They see
the model only through its attach points.
"""

import contextlib
import importlib
import inspect
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.config_values import PRESERVES
from library.errors import UserError
from library.generation.paint import evaluating
from library.models.family import Family
from library.models.files.checkpoint import open_weights, stores_metadata, write_tensors
from library.models.metadata import RunFacts, network_hashes, network_metadata
from library.models.views import AttachPoints
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.training.methods.attached import AttachedLayers
from library.training.methods.base import Method, ParameterGroup

_NORMS = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")


class NetworkMethod(Method):
    """Trains what --network_module creates."""

    log_name = "network_train"

    def __init__(self, options: NetworkOptions, optimizer: OptimizerOptions):
        self.options = options
        self.module = import_network_module(options.network_module)
        self.default_rate = optimizer.learning_rate
        self.network: nn.Module
        self.points: AttachPoints
        self.epoch = 0
        self.multiplier = 1.0
        self.norms: dict[str, Tensor | float] = {}

    def build(self, model: Family) -> nn.Module:
        model.requires_grad_(False)
        self.points = model.attach_points()
        text_encoders = self._text_encoders()
        keywords = dict(self.options.network_keywords)
        keywords.setdefault("dropout", self.options.network_dropout)
        try:
            self.network = self.module.create_network(
                1.0,
                self.options.rank,
                self.options.network_alpha,
                model.vae,
                text_encoders,
                self.points.unet,
                neuron_dropout=self.options.network_dropout,
                **keywords,
            )
        except ValueError as error:
            raise UserError(f"--network_args: {self.options.network_module} refuses them: {error}") from error
        if self.options.scale_weight_norms and not hasattr(self.network, "apply_max_norm_regularization"):
            raise UserError(
                f"--scale_weight_norms: networks of {self.options.network_module} cannot be scaled down, leave it out"
            )
        with AttachedLayers(model.text_encoders, model.unet) as self.layers:
            self.network.apply_to(text_encoders, self.points.unet, self.trains_text_encoder(), self._trains_unet())
        self.network.prepare_grad_etc(text_encoders, self.points.unet)
        self.network.to(model.unet.device, torch.float32)
        return self.network

    def parameter_groups(self) -> list[ParameterGroup]:
        rates = self.options.text_encoder_lr or (None,)
        encoders = len(self.points.text_encoders)
        if len(rates) > encoders:
            count = "one text encoder" if encoders == 1 else f"{encoders} text encoders"
            raise UserError(f"--text_encoder_lr: {len(rates)} rates are given, but the model has {count}")
        unet_rate, default = self.options.unet_lr, self.default_rate
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            answer = several(list(rates) if self.options.text_encoder_lr else None, unet_rate, default)
        else:
            answer = self.network.prepare_optimizer_params(rates[0], unet_rate, default)
        groups, names = answer if isinstance(answer, tuple) else (answer, None)
        if not groups:
            raise UserError("nothing is left to train: every learning rate of the network is 0")
        names = names or ([f"group{i}" for i in range(len(groups))] if len(groups) > 1 else ["network"])
        return [
            ParameterGroup(name, list(group["params"]), float(group.get("lr", default)))
            for name, group in zip(names, groups, strict=True)
        ]

    def trains_text_encoder(self) -> bool:
        return self.options.trains_text_encoder

    def _trains_unet(self) -> bool:
        return not self.options.network_train_text_encoder_only

    def _text_encoders(self) -> nn.Module | list[nn.Module]:
        """One module, or a list where the model has several, as network modules expect it."""
        encoders = self.points.text_encoders
        return encoders[0] if len(encoders) == 1 else encoders

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def on_micro_step(self, batch: Batch) -> None:
        if batch.plan.epoch != self.epoch:
            self.epoch = batch.plan.epoch
            self.network.on_epoch_start(self._text_encoders(), self.points.unet)
        self._set_multiplier(batch.network_multiplier)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start()

    def reads_gradients(self) -> bool:
        return hasattr(self.network, "update_grad_norms")

    def before_step(self) -> None:
        if self.reads_gradients():
            self._ask("update_grad_norms")

    def after_step(self, step: int) -> None:
        limit = self.options.scale_weight_norms
        if limit:
            device = next(self.network.parameters()).device
            answer = self._ask("apply_max_norm_regularization", limit, device)
            if not isinstance(answer, Sequence) or len(answer) != len(_NORMS):
                raise UserError(
                    f"--scale_weight_norms: networks of {self.options.network_module} do not say how many weights they "
                    "have scaled and the mean and the largest norm, leave it out"
                )
            self.norms = dict(zip(_NORMS, answer, strict=True))

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What an optional method of the network answers. UserError if it fails."""
        try:
            return getattr(self.network, name)(*arguments)
        except Exception as error:  # whatever other people's raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--network_module: {name} of {self.options.network_module} fails: {reason}") from error

    def measured(self) -> Mapping[str, Tensor | float]:
        return self.norms

    def rehearsed(self) -> None:
        self.epoch = 0
        self.norms = {}
        self._set_multiplier(1.0)

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        self._set_multiplier(1.0)  # each micro-batch sets its own
        yield

    @contextlib.contextmanager
    def without_trained(self) -> Iterator[None]:
        with self.layers.as_before():
            if self.layers.restorable:
                yield
                return
            if not hasattr(self.network, "set_multiplier"):
                raise UserError(
                    f"--network_module: networks of {self.options.network_module} cannot be switched off: leave "
                    f"{PRESERVES} out"
                )
            multiplier = self.multiplier
            self._set_multiplier(0.0)
            try:
                with evaluating(self.network):
                    yield
            finally:
                self._set_multiplier(multiplier)

    def _set_multiplier(self, multiplier: float) -> None:
        """How strongly the network acts on the model."""
        if multiplier != self.multiplier:
            self.network.set_multiplier(multiplier)
            self.multiplier = multiplier

    def target(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.{self.options.save_model_as}")

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        """The network writes its file aside, for what it puts there is its own affair; ours is hashed and whole."""
        path = self.target(stem)
        # named as all that is unfinished; a name of its own inside, with the ending by which the network knows a format
        folder = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft = folder / f"network{path.suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.network.save_weights(str(draft), dtype, None)
            with open_weights(draft) as file:
                tensors = {key: file.get(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if stores_metadata(path):
            metadata = {**metadata, **network_hashes(tensors, None, metadata)}
        write_tensors(path, tensors, None, metadata)
        return path

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        merged = [[path.name, strength] for path, strength in self.options.base_networks]
        own = {
            "network_dim": self.options.rank,
            "network_args": self.options.network_keywords,
            "base_weights": merged,
        }
        return network_metadata({**settings, **own}, facts)


def import_network_module(name: str | None) -> ModuleType:
    """The module of --network_module. UserError if it is missing or is no network module."""
    if not name:
        raise UserError("no network to train: give --network_module one, such as networks.lora")
    try:
        module = importlib.import_module(name)
    except (ModuleNotFoundError, TypeError) as error:  # a TypeError is a name that starts with a dot
        missing = getattr(error, "name", None) or name
        if not name.startswith(missing):
            raise UserError(f"--network_module {name} needs the package {missing}: pip install {missing}") from error
        raise UserError(f"--network_module: there is no module {name} (LoRA is networks.lora)") from error
    if not inspect.isfunction(getattr(module, "create_network", None)):
        raise UserError(f"--network_module {name} is no network module: it has no function create_network")
    return module
