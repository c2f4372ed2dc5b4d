"""Training a network (LoRA or a relative) beside a frozen model.

`NetworkMethod` is the one place that knows how network modules, ours and other people's, want to be called. They see
the model only through its attach points.
"""

import argparse
import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from library.console import notice, warn
from library.data.batch import Batch
from library.data.config import DatasetConfig
from library.data.config_values import PRESERVES
from library.data.records import RecordTable
from library.errors import UserError
from library.generation.paint import evaluating
from library.models.family import Family
from library.models.metadata import RunFacts, network_metadata
from library.models.registry import ModelInfo
from library.models.views import AttachPoints
from library.options.network import NetworkOptions, names_file
from library.options.optimizer import OptimizerOptions
from library.training.methods import network_8_bits, network_weights
from library.training.methods.attached import AttachedLayers
from library.training.methods.base import Method, ParameterGroup
from library.training.methods.network_groups import read_groups
from library.training.methods.network_module import (
    called,
    check_arguments,
    failing_as_mistake,
    failure,
    import_network_module,
    reason,
)
from library.training.methods.network_saving import write_network
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
        self.alpha = options.network_alpha
        self.datasets: Sequence[DatasetConfig] = ()
        self.network: nn.Module
        self.points: AttachPoints
        self.without_values = False
        self.epoch = 0
        self.multiplier = 1.0
        self.norms: dict[str, Tensor | float] = {}

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: Mapping[str, Any] | None) -> None:
        """UserError, too, for --network_weights that do not fit the model or the flags, but for --network_alpha, in
        whose place that of the file is used.
        """
        if resumed is not None:
            self.resumed = True
            self.alpha = resumed.get("settled", {}).get("network_alpha", self.alpha)
        self._check_arguments(sdxl=info.family.name == "sdxl")
        if self._start() is None:
            return
        with contextlib.suppress(NotImplementedError):  # networks that need values show it when they are there
            try:
                self.build(info.outline())
            except network_weights.OtherAlpha as other:
                self._take_alpha(info, other)

    def _check_arguments(self, *, sdxl: bool) -> None:
        """UserError for --network_args that our own networks refuse whatever the weights, a warning for what is
        probably not meant.
        """
        check = getattr(self.module, "check_network_args", None)
        rank = None if self.options.dim_from_weights else self.options.rank
        try:
            if inspect.isfunction(check):
                for remark in check(rank, sdxl, self._trained(), **self.options.network_keywords):
                    warn(f"--network_args: {remark}")
        except ValueError as error:
            raise self._refused_arguments(error) from error

    def _refused_arguments(self, error: ValueError) -> UserError:
        return UserError(f"--network_args: {self.options.network_module} refuses them: {reason(error)}")

    def _take_alpha(self, info: ModelInfo, other: network_weights.OtherAlpha) -> None:
        """Have the network made with the alpha of a file, and raise what it has raised if that does not do either."""
        self.alpha = other.alpha
        try:
            self.build(info.outline())
        except network_weights.OtherAlpha:
            raise other from None
        given = self.options.network_alpha
        warn(f"--network_weights: the file's alpha {other.alpha:g} is used, not {given:g}")

    def settled(self) -> dict[str, Any]:
        return {} if self.alpha == self.options.network_alpha else {"network_alpha": self.alpha}

    def check_captions(self, table: RecordTable, datasets: Sequence[DatasetConfig]) -> None:
        """What they ask of a network is looked at when there is one."""
        self.datasets = datasets

    def _start(self) -> Path | None:
        """The file that the network is made from or starts with; the weights of a state win over it."""
        needed = self.options.dim_from_weights or not self.resumed
        return Path(self.options.network_weights) if self.options.network_weights and needed else None

    def build(self, model: Family) -> nn.Module:
        model.requires_grad_(False)
        self.points = model.attach_points()
        self.without_values = model.unet.device.type == "meta"
        start, name = self._start(), self.options.network_module
        tensors = network_weights.read_network(start) if start else {}
        try:
            made = self.options.dim_from_weights
            self.network = self._made_from(start, tensors, model) if made else self._create(model)
            self._attach(model)
        except UserError as error:
            if network_8_bits.is_cause(error, self.points):
                raise network_8_bits.refusal(self.options, self.settings) from error
            raise
        self._check_datasets()
        if self.without_values and not raw(self.network):
            raise NotImplementedError(f"{name} makes no network without values")
        if start:
            with network_weights.naming_family(start, tensors, model):
                tensors = network_weights.with_own_names(self.network, tensors)
                network_weights.check_fit(self.network, name, start, tensors, made_from_it=made)
        with self._called("prepare_grad_etc"):
            self.network.prepare_grad_etc(*self._places())
        self.network.to(model.unet.device, torch.float32)
        if start:
            network_weights.take_over(self.network, name, start, tensors)
        network_8_bits.try_layers(self.points, self.options, self.settings)
        return self.network

    def _called(self, what: str, flag: str = "--network_module") -> contextlib.AbstractContextManager[None]:
        """While it lasts, a network is put together by `what` of its module; see `called`."""
        return called(self.options.network_module, what, flag, without_values=self.without_values)

    def _places(self) -> tuple[nn.Module | list[nn.Module], nn.Module]:
        return self.points.text_encoder, self.points.unet

    def _create(self, model: Family) -> nn.Module:
        options = self.options
        keywords: dict[str, Any] = dict(options.network_keywords)
        keywords.setdefault("dropout", options.network_dropout)
        arguments = 1.0, options.rank, self.alpha, model.vae, *self._places()
        with self._called("create_network", "--network_module, --network_args"):
            try:
                return self.module.create_network(*arguments, neuron_dropout=options.network_dropout, **keywords)
            except ValueError as error:
                raise self._refused_arguments(error) from error

    def _made_from(self, file: Path, tensors: Mapping[str, Tensor], model: Family) -> nn.Module:
        """The network that a file is of."""
        name, keywords = self.options.network_module, dict(self.options.network_keywords)
        if self.options.network_dropout is not None:
            keywords.setdefault("dropout", self.options.network_dropout)
        make = getattr(self.module, "create_network_from_weights", None)
        if make is None:
            raise UserError(f"--dim_from_weights: {name} cannot make networks from files, leave it out")
        calling = self._called("create_network_from_weights", f"--dim_from_weights with {file}")
        with network_weights.naming_family(file, tensors, model), calling:
            try:
                network, _ = make(1.0, str(file), None, *self._places(), weights_sd=dict(tensors), **keywords)
            except ValueError as error:
                raise UserError(f"--dim_from_weights: {name} makes no network of {file}: {reason(error)}") from error
        return network

    def _attach(self, model: Family) -> None:
        """Put the network beside the layers of the model."""
        name, network = self.options.network_module, self.network
        if hasattr(network, "prepare_network"):
            with self._called("prepare_network"):
                network.prepare_network(_namespace(self.settings))
        if self.options.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
            raise UserError(f"--scale_weight_norms: networks of {name} cannot be scaled down, leave it out")
        rounds = self.settings.get("full_bf16")
        if rounds and any(key.endswith("dora_scale") for key, _ in network.named_parameters()):
            notice(
                "--full_bf16: the magnitudes of this DoRA are trained in bf16, too, in which small steps are lost; "
                "without it they are kept"
            )
        with self._called("apply_to"), AttachedLayers(model.text_encoders, model.unet) as self.layers:
            network.apply_to(*self._places(), self.trains_text_encoder(), self._trains_unet())

    def _check_datasets(self) -> None:
        """UserError for what the datasets ask of a network whose strength cannot be set."""
        if hasattr(self.network, "set_multiplier"):
            return
        name = self.options.network_module
        for dataset in self.datasets:
            if dataset.network_multiplier != 1:
                raise UserError(
                    f"{dataset.where('network_multiplier')}: networks of {name} have no strength that could be set "
                    "(no set_multiplier): leave it out"
                )
            for subset in dataset.subsets:
                if subset.is_preserved and not self.layers.restorable:
                    raise UserError(
                        f"{subset.where('custom_attributes')}: networks of {name} cannot be switched off, which "
                        f"{PRESERVES} needs: leave it out"
                    )

    def parameter_groups(self) -> list[ParameterGroup]:
        rates = self.options.text_encoder_lr or (None,)
        encoders = len(self.points.text_encoders)
        if len(rates) > encoders:
            count = "one text encoder" if encoders == 1 else f"{encoders} text encoders"
            raise UserError(f"--text_encoder_lr: {len(rates)} rates are given, but the model has {count}")
        unet_rate, default, name = self.options.unet_lr, self.default_rate, self.options.network_module
        hook = "prepare_optimizer_params_with_multiple_te_lrs"
        if hasattr(self.network, hook):
            answer = self._ask(hook, list(rates) if self.options.text_encoder_lr else None, unet_rate, default)
        else:
            hook = "prepare_optimizer_params"
            if len(set(rates)) > 1:
                warn(f"networks of {name} take one --text_encoder_lr for all text encoders: {rates[0]:g} is used")
            answer = self._ask(hook, rates[0], unet_rate, default)
        groups = read_groups(answer, name, hook, default)
        return [replace(group, by_chance=self._drops_modules()) for group in groups]

    def _drops_modules(self) -> bool:
        """Whether chance leaves out modules of the network in a step, or whole ranks of them."""
        chances = (self.options.network_keywords.get(name, "0") for name in ("module_dropout", "rank_dropout"))
        return getattr(self.network, "trains_by_chance", False) or not all(map(_is_zero, chances))

    def trains_text_encoder(self) -> bool:
        return self.options.trains_text_encoder

    def _trains_unet(self) -> bool:
        return not self.options.network_train_text_encoder_only

    def _trained(self) -> list[str]:
        """The parts of the model that the network is for, as our own networks call them."""
        parts = {"text_encoder": self.trains_text_encoder(), "unet": self._trains_unet()}
        return [part for part, is_trained in parts.items() if is_trained]

    def enable_gradient_checkpointing(self) -> None:
        self._ask("enable_gradient_checkpointing")

    def on_micro_step(self, batch: Batch) -> None:
        if batch.plan.epoch != self.epoch:
            self.epoch = batch.plan.epoch
            self._ask("on_epoch_start", *self._places())
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
        with failing_as_mistake(failure(self.options.network_module, name)):
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
            self._ask("set_multiplier", multiplier)
            self.multiplier = multiplier

    def target(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.{self.options.save_model_as}")

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        return write_network(self.network, self.options.network_module, self.target(stem), dtype, metadata)

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        own: dict[str, Any] = {
            "network_dim": self.options.rank,
            "network_alpha": self.alpha,
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


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def _namespace(settings: Mapping[str, Any]) -> argparse.Namespace:
    """The flags as other toolkits have them: texts for paths, lists for several values."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return argparse.Namespace(**{n: list(value) if isinstance(value, tuple) else value for n, value in values.items()})
