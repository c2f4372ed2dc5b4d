"""Optimizers by name, their learning rates, and their state."""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.console import quiet_dependencies, warn
from library.errors import UserError, suggest
from library.options.optimizer import OPTIMIZERS, OptimizerOptions
from library.training.methods.base import ParameterGroup

_PARAMETER_SHAPED = ("exp_avg", "exp_avg_sq", "z", "state1", "state2")  # state that has its parameter's shape
_FEW = 4096  # of fewer values 8-bit optimizers keep more bits
_SMALL, _LARGE = 32, 512  # sides of the matrices that stand for those with fewer values and for others
_USUAL_FACTORS = (0.1, 10.0)  # of the rate that an optimizer finds itself


def make_optimizer(options: OptimizerOptions, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer_type over the groups, in their order, each with its own learning rate.

    UserError if its package is missing, or if it refuses its arguments or the rates.
    """
    if OPTIMIZERS[options.optimizer].adapts_rate:
        _check_factors(options.optimizer, groups)
    return _make(options, groups)


def check_optimizer(options: OptimizerOptions) -> None:
    """UserError for a missing package and for arguments that the optimizer does not take, before anything is loaded."""
    _make(options, [ParameterGroup("", [nn.Parameter(torch.zeros(1))], options.learning_rate)])


def _make(options: OptimizerOptions, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    kind = import_optimizer(options.optimizer)
    keywords = literal_keywords(kind, options.optimizer_keywords)
    try:
        with quiet_dependencies():
            optimizer = kind([{"params": group.parameters, "lr": group.learning_rate} for group in groups], **keywords)
        if hasattr(optimizer, "train"):
            _start_averaging(optimizer)
        return optimizer
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {kind.__name__} refuses them: {error}") from error


def _start_averaging(optimizer: torch.optim.Optimizer) -> None:
    """Put a schedule-free optimizer where its steps start. ValueError where it could not come back from its average."""
    if "betas" in optimizer.defaults and not 0 < optimizer.defaults["betas"][0] < 1:
        raise ValueError("the first of betas has to be between 0 and 1")
    optimizer.train()


def import_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name in OPTIMIZERS. UserError if its package is missing or does not work."""
    source = OPTIMIZERS[name]
    try:
        with quiet_dependencies():
            return getattr(importlib.import_module(source.module), source.name)
    except ModuleNotFoundError as error:
        itself = source.module.startswith(error.name or source.module)  # rather than something it needs
        package = source.package if itself else error.name
        raise UserError(f"--optimizer_type {name} needs the package {package}: pip install {package}") from error
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--optimizer_type {name}: the installed {source.package} does not work ({error}): "
            f"pip install --upgrade {source.package}"
        ) from error


def _check_factors(name: str, groups: Sequence[ParameterGroup]) -> None:
    """What an optimizer that finds its rate itself makes of the groups' rates."""
    rates = {group.learning_rate for group in groups if group.learning_rate > 0}
    if len(rates) > 1:
        named = ", ".join(f"{group.name} {group.learning_rate:g}" for group in groups)
        raise UserError(
            f"--optimizer_type {name} finds one learning rate for all parts, but theirs differ ({named}): give "
            "--learning_rate alone, usually 1"
        )
    low, high = _USUAL_FACTORS
    for rate in rates:
        if not low <= rate <= high:
            result = "almost nothing" if rate < low else "too much"
            warn(
                f"--optimizer_type {name} finds the learning rate itself and multiplies it by the one given, which is "
                f"usually 1; with {rate:g} it will learn {result}"
            )


def literal_keywords(kind: type, keywords: Mapping[str, str]) -> dict[str, Any]:
    """--optimizer_args read as Python literals; text that is none stays text. UserError for a name it does not take."""
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params", "lr")]
    values = {}
    for name, text in keywords.items():
        if name not in known:
            raise UserError(
                f"--optimizer_args: {kind.__name__} takes no {name}{suggest(name, known)} (it takes {', '.join(known)})"
            )
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def state_bytes(options: OptimizerOptions, parameters: Iterable[Tensor], device: torch.device) -> int:
    """About how many bytes the optimizer keeps of these parameters, which need no values."""

    @functools.cache
    def per_value(side: int) -> float:
        probe = nn.Parameter(torch.ones(side, side, device=device))
        optimizer = _make(options, [ParameterGroup("", [probe], 1.0)])
        probe.grad = torch.ones_like(probe)
        optimizer.step()
        return sum(tensor.nbytes for tensor in tensors_in(optimizer.state)) / probe.numel()

    return round(sum(tensor.numel() * per_value(_SMALL if tensor.numel() < _FEW else _LARGE) for tensor in parameters))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples, such as an optimizer's state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def effective_rates(optimizer: torch.optim.Optimizer, scheduler_rates: Sequence[float]) -> list[float]:
    """The learning rates that the next step will move each group with, where `scheduler_rates` are given to it.

    Those that find the rate themselves multiply it by their estimate d; schedule-free ones may warm up on their own.
    """
    rates = []
    for group, rate in zip(optimizer.param_groups, scheduler_rates, strict=True):
        warmup = group.get("warmup_steps", 0)
        done = group.get("k", warmup)
        part = (done + 1) / warmup if done < warmup else 1.0
        rates.append(float(rate * part * group.get("d", 1.0)))
    return rates


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer.state_dict()` gave, bit for bit; the optimizer may take over its tensors.

    `Optimizer.load_state_dict` rounds all state to the type of its parameter, which some optimizers keep in a finer
    one; here it gets the stored type back. Raises ValueError, before anything is changed, when groups or shapes are not
    those of this optimizer's parameters.
    """
    groups, stored_groups = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in stored_groups]:
        raise ValueError("the optimizer's state has other groups of parameters")
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in stored_groups for index in group["params"]]
    entries = {index: state["state"].get(index, {}) for index in indices}
    for number, (parameter, entry) in enumerate(zip(parameters, entries.values(), strict=True)):
        for shape in _shapes(entry):
            if shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's state of parameter {number} is for the shape {list(shape)}, but it has "
                    f"{list(parameter.shape)}"
                )
    optimizer.load_state_dict(dict(state))
    for parameter, entry in zip(parameters, entries.values(), strict=True):
        if entry:
            _put_types_back(optimizer.state[parameter], entry)


def _shapes(entry: Mapping[str, Any]) -> Iterator[torch.Size]:
    """Shapes in a parameter's state that must be its own; bitsandbytes hides quantised state one level down."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _shapes(value)
        elif name in _PARAMETER_SHAPED:
            yield value.shape


def _put_types_back(loaded: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Replace tensors that loading has cast by the stored ones, on the device where they were loaded to."""
    for name, value in stored.items():
        now = loaded.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
            loaded[name] = value.to(now.device)
        elif isinstance(value, dict) and isinstance(now, dict):
            _put_types_back(now, value)
