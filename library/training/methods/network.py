"""Training a network (LoRA or a relative) beside a frozen model.

`NetworkMethod` is the one place that knows how network modules, ours and other people's, want to be called. They see
the model only through its attach points.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from library.console import warn
from library.data.batch import Batch
from library.data.config_values import PRESERVES
from library.errors import UserError
from library.generation.paint import evaluating
from library.models import float8
from library.models.family import Family
from library.models.files.checkpoint import open_weights, stores_metadata, write_tensors
from library.models.metadata import RunFacts, network_hashes, network_metadata
from library.models.registry import ModelInfo
from library.models.views import AttachPoints
from library.options.network import NetworkOptions, names_file
from library.options.optimizer import OptimizerOptions
from library.training.methods import network_weights
from library.training.methods.attached import AttachedLayers
from library.training.methods.base import Method, ParameterGroup
from library.training.methods.network_module import (
    called,
    check_arguments,
    failing_as_mistake,
    import_network_module,
    reason,
)
from library.training.preservation import Preservation
from library.training.resuming.packing import raw

_NORMS = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")


class NetworkMethod(Method):
    """Trains what --network_module creates. `settings` are all flags by name, for networks that ask for them."""

    log_name = "network_train"

    def __init__(
        self, options: NetworkOptions, optimizer: OptimizerOptions, settings: Mapping[str, Any] = MappingProxyType({})
    ):
        self.options = options
        self.module = import_network_module(options.network_module)
        check_arguments(self.module, options.network_keywords)
        self.default_rate = optimizer.learning_rate
        self.settings = settings
        self.resumed = False
        self.network: nn.Module
        self.points: AttachPoints
        self.epoch = 0
        self.multiplier = 1.0
        self.norms: dict[str, Tensor | float] = {}

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: bool) -> None:
        """UserError, too, for --network_weights that do not fit the model or the flags."""
        self.resumed = resumed
        if self._start() is not None:
            with contextlib.suppress(NotImplementedError):  # networks that need values show it when they are there
                self.build(info.outline())

    def _start(self) -> Path | None:
        """The file that the network is made from or starts with; the weights of a state win over it."""
        needed = self.options.dim_from_weights or not self.resumed
        return Path(self.options.network_weights) if self.options.network_weights and needed else None

    def build(self, model: Family) -> nn.Module:
        model.requires_grad_(False)
        self.points = model.attach_points()
        start, name = self._start(), self.options.network_module
        tensors = network_weights.read_network(start) if start else {}
        try:
            self.network = self._made_from(start, tensors) if self.options.dim_from_weights else self._create(model)
            self._attach(model)
        except UserError as error:
            in_8_bits = "float8" in str(error).lower()
            raise (self._because_of_8_bits() if in_8_bits else error) from error
        if model.unet.device.type == "meta" and not raw(self.network):
            raise NotImplementedError(f"{name} makes no network without values")
        if start:
            tensors = network_weights.with_own_names(self.network, tensors)
            made = self.options.dim_from_weights
            network_weights.check_fit(self.network, name, start, tensors, made_from_it=made)
        with called(name, "prepare_grad_etc"):
            self.network.prepare_grad_etc(self._text_encoders(), self.points.unet)
        self.network.to(model.unet.device, torch.float32)
        if start:
            network_weights.take_over(self.network, name, start, tensors)
        self._try_layers_in_8_bits()
        return self.network

    def _create(self, model: Family) -> nn.Module:
        name, options = self.options.network_module, self.options
        keywords: dict[str, Any] = dict(options.network_keywords)
        keywords.setdefault("dropout", options.network_dropout)
        arguments = 1.0, options.rank, options.network_alpha, model.vae, self._text_encoders(), self.points.unet
        with called(name, "create_network", "--network_module, --network_args"):
            try:
                return self.module.create_network(*arguments, neuron_dropout=options.network_dropout, **keywords)
            except ValueError as error:
                raise UserError(f"--network_args: {name} refuses them: {reason(error)}") from error

    def _made_from(self, file: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The network that a file is of."""
        name, keywords = self.options.network_module, dict(self.options.network_keywords)
        if self.options.network_dropout is not None:
            keywords.setdefault("dropout", self.options.network_dropout)
        make = getattr(self.module, "create_network_from_weights", None)
        if make is None:
            raise UserError(f"--dim_from_weights: {name} cannot make networks from files, leave it out")
        places = None, self._text_encoders(), self.points.unet
        with called(name, "create_network_from_weights", f"--dim_from_weights with {file}"):
            network, _ = make(1.0, str(file), *places, weights_sd=dict(tensors), **keywords)
        return network

    def _attach(self, model: Family) -> None:
        """Put the network beside the layers of the model."""
        name, network = self.options.network_module, self.network
        if hasattr(network, "prepare_network"):
            self._ask("prepare_network", _namespace(self.settings))
        if self.options.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
            raise UserError(f"--scale_weight_norms: networks of {name} cannot be scaled down, leave it out")
        with called(name, "apply_to"), AttachedLayers(model.text_encoders, model.unet) as self.layers:
            network.apply_to(self._text_encoders(), self.points.unet, self.trains_text_encoder(), self._trains_unet())

    def _layers_in_8_bits(self) -> list[nn.Module]:
        trees = (*self.points.text_encoders, self.points.unet)
        layers = [layer for tree in trees for layer in tree.modules()]
        return [layer for layer in layers if getattr(layer._parameters.get("weight"), "dtype", None) == float8.FORMAT]

    @torch.no_grad()
    def _try_layers_in_8_bits(self) -> None:
        """One of each kind. UserError for a network that computes with their weights itself, and in their format."""
        tried: dict[tuple[type, ...], nn.Module] = {}
        for layer in self._layers_in_8_bits():
            tried.setdefault((type(layer), type(getattr(layer.forward, "__self__", None))), layer)
        for layer in tried.values():
            out_of, kernel = layer.weight.shape[1], layer.weight.shape[2:]
            x = torch.zeros(1, out_of, *kernel, device=layer.weight.device, dtype=torch.bfloat16)
            try:
                with (
                    torch.autocast(x.device.type, torch.bfloat16, enabled=not x.is_meta),
                    failing_as_mistake(self.options.network_module, "forward"),
                ):
                    if layer(x).dtype != x.dtype:
                        raise UserError("what layers put out has the format of the network")
            except NotImplementedError:  # without values there is nothing to try
                return
            except UserError as error:
                raise self._because_of_8_bits() from error

    def _because_of_8_bits(self) -> UserError:
        """For networks that fail on layers of this format."""
        flag = "--fp8_base" if self.settings.get("fp8_base", True) else "--fp8_base_unet"
        passes_by = not self.module.__name__.startswith("lycoris.") or "bypass_mode" in self.options.network_keywords
        return UserError(
            f"{flag}: this network of {self.options.network_module} computes with the model's weights itself, which it "
            f"cannot in 8 bits: drop {flag}{'' if passes_by else ', or try --network_args bypass_mode=True'}"
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        rates = self.options.text_encoder_lr or (None,)
        encoders = len(self.points.text_encoders)
        if len(rates) > encoders:
            count = "one text encoder" if encoders == 1 else f"{encoders} text encoders"
            raise UserError(f"--text_encoder_lr: {len(rates)} rates are given, but the model has {count}")
        unet_rate, default = self.options.unet_lr, self.default_rate
        if hasattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs"):
            given = list(rates) if self.options.text_encoder_lr else None
            answer = self._ask("prepare_optimizer_params_with_multiple_te_lrs", given, unet_rate, default)
        else:
            if len(set(rates)) > 1:
                name = self.options.network_module
                warn(f"networks of {name} take one --text_encoder_lr for all text encoders: {rates[0]:g} is used")
            answer = self._ask("prepare_optimizer_params", rates[0], unet_rate, default)
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
            self._ask("on_epoch_start", self._text_encoders(), self.points.unet)
        self._set_multiplier(batch.network_multiplier)
        if hasattr(self.network, "on_step_start"):
            self._ask("on_step_start")

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
        """What a method of the network answers. UserError if it fails."""
        with failing_as_mistake(self.options.network_module, name):
            return getattr(self.network, name)(*arguments)

    def measured(self) -> Mapping[str, Tensor | float]:
        return self.norms

    def rehearsed(self) -> None:
        self.epoch = 0
        self.norms = {}
        self._set_multiplier(1.0)

    def state_dict(self) -> dict[str, Any]:
        """What the network keeps besides parameters and persistent buffers: scaled norms, in some networks."""
        besides = self._unnamed_buffers()
        return {"besides": besides} if besides else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self._unnamed_buffers()
        for name, tensor in state.get("besides", {}).items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)

    def _unnamed_buffers(self) -> dict[str, Tensor]:
        named = raw(self.network)
        return {name: buffer for name, buffer in self.network.named_buffers() if name not in named}

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        self._set_multiplier(1.0)  # each micro-batch sets its own
        yield

    def preservation(self) -> Preservation:
        return Preservation(self.without_trained, trains_text_encoder=self.trains_text_encoder())

    @contextlib.contextmanager
    def without_trained(self) -> Iterator[None]:
        """While it lasts, the model answers as if the network was not there, and draws nothing at random."""
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
        own: dict[str, Any] = {
            "network_dim": self.options.rank,
            "network_args": self.options.network_keywords,
            "base_weights": [[path.name, strength] for path, strength in self.options.base_networks],
        }
        if self.options.dim_from_weights:
            found = network_weights.ranks_and_alphas(self.network)
            for name, values in zip(("network_dim", "network_alpha"), found, strict=True):
                own[name] = min(values) if len(values) == 1 else "Dynamic"
        if names_file(name := self.options.network_module):
            own["network_module"] = Path(name).stem
        return network_metadata({**settings, **own}, facts)


def _namespace(settings: Mapping[str, Any]) -> argparse.Namespace:
    """The flags as other toolkits have them: texts for paths, lists for several values."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return argparse.Namespace(**{n: list(value) if isinstance(value, tuple) else value for n, value in values.items()})
