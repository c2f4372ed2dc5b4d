"""Optimizers by name, their learning rates, and their state."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.console import notice, quiet_dependencies, warn
from library.errors import UserError
from library.options.optimizer import OPTIMIZERS, TORCH_OPTIMIZERS, OptimizerOptions
from library.training.methods.base import ParameterGroup
from library.training.optimization.apart import ALONE, by_rate
from library.training.optimization.arguments import literal, literal_keywords, takes
from library.training.optimization.classes import import_class, reason
from library.training.resuming.packing import pack

_PARAMETER_SHAPED = (
    *("exp_avg", "exp_avg_sq", "exp_avg_diff", "pre_grad", "momentum_buffer", "square_avg"),
    *("z", "x0", "sk", "alphak", "state1", "state2"),
)
"""State that has its parameter's shape, or several of it."""
_FEW = 4096  # of fewer values 8-bit optimizers keep more bits
_ENOUGH = 512  # values along each side of a weight: a larger one takes as much memory per value
_USUAL_FACTORS = (0.1, 10.0)  # of the rate that an optimizer finds itself


def make_optimizer(options: OptimizerOptions, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer_type over the groups, in their order, each with its own learning rate.

    Says what it makes of the rates. UserError if its package is missing, or if it refuses its arguments or the rates.
    """
    optimizer = _make(options, groups)
    given, added = options.optimizer_keywords, options.source.arguments
    shown = [f"{name}={value}" for name, value in added.items() if name not in given]
    if shown and not finds_steps(optimizer):
        notice(f"{options.optimizer} has {' and '.join(shown)} unless --optimizer_args says otherwise")
    rates = {group.learning_rate for group in groups if group.learning_rate > 0}
    named = ", ".join(f"{group.name} {group.learning_rate:g}" for group in groups)
    if options.source.adapts_rate:
        _check_factors(options.optimizer, rates)
        if len(rates) > 1:
            notice(
                f"{options.optimizer} finds a learning rate for each part, times the one given ({named}): what comes "
                "out need not be in that ratio"
            )
    if _needs_steps(options):
        notice("--optimizer_args: AdaFactor has relative_step=True all the same, because warmup_init=True needs it")
    if finds_steps(optimizer):
        notice(
            f"{options.optimizer} chooses the learning rate itself (relative_step=True), so that those given ({named}) "
            "have no effect unless they are 0; relative_step=False in --optimizer_args lets them"
        )
    if options.optimizer.startswith("Paged") and groups[0].parameters[0].device.type == "cpu":
        notice(f"{options.optimizer} keeps its state where it is on the CPU: paging is for the memory of GPUs")
    return optimizer


def probe_optimizer(
    options: OptimizerOptions, shape: tuple[int, ...] = (2, 2), device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer over one parameter of its own, to try things on. UserError for a missing package and for arguments
    that it does not take.
    """
    parameter = nn.Parameter(torch.ones(shape, device=device))
    return _make(options, [ParameterGroup("", [parameter], options.learning_rate or 1.0)])


def try_optimizer(options: OptimizerOptions, device: torch.device, *, spread: bool) -> None:
    """UserError for an optimizer that cannot take a step here, or whose state could not be kept in files, before any
    weights are read. `spread`: no process will have all of the weights.
    """
    if spread and options.source.adapts_rate:
        raise UserError(
            f"--optimizer_type {options.optimizer} needs all gradients in each process, which FSDP and DeepSpeed "
            "spread: leave one of them out"
        )
    optimizer = _stepped(options, (2, 2), device)
    try:
        pack(optimizer.state_dict(), {}, "its state")
    except TypeError as problem:
        raise UserError(f"--optimizer_type {options.optimizer} cannot be resumed: {problem}") from None


def _stepped(options: OptimizerOptions, shape: tuple[int, ...], device: torch.device) -> torch.optim.Optimizer:
    """An optimizer after a step with one parameter. UserError if it fails."""
    optimizer = probe_optimizer(options, shape, device)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    try:
        with quiet_dependencies():
            optimizer.step()
    except Exception as error:  # whatever a class of other people's raises
        raise UserError(f"--optimizer_type {options.optimizer} cannot take a step here: {reason(error)}") from error
    return optimizer


def _make(options: OptimizerOptions, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    kind = import_optimizer(options)
    keywords = keywords_of(options, kind)
    own = [{"params": group.parameters, "lr": group.learning_rate} for group in groups]
    for group, asked in zip(own, groups, strict=True):
        if asked.steps is not None and options.source.adapts_rate:
            group[ALONE] = True
    if keywords.get("relative_step"):
        for group in own:
            if group["lr"] == 0:
                group |= {"relative_step": False, "warmup_init": False}  # else it would move
    elif takes(kind, "lr"):
        keywords["lr"] = max(group["lr"] for group in own) or 1.0  # some need it, and need more than 0
    try:
        with quiet_dependencies():
            optimizer = (by_rate(kind) if options.source.adapts_rate else kind)(own, **keywords)
        if hasattr(optimizer, "train"):
            _start_averaging(optimizer)
        return optimizer
    except Exception as error:  # whatever a class of other people's raises
        mistaken = f"--optimizer_args: {kind.__name__} refuses them"
        if not options.optimizer_keywords:
            mistaken = f"--optimizer_type {options.optimizer} cannot be used"
        raise UserError(f"{mistaken}: {reason(error)}") from error


def keywords_of(options: OptimizerOptions, kind: type) -> dict[str, Any]:
    """--optimizer_args as Python values, and what this optimizer needs besides."""
    keywords = {**options.source.arguments, **literal_keywords(kind, options.optimizer_keywords)}
    return keywords | {"relative_step": True} if _needs_steps(options) else keywords


def _needs_steps(options: OptimizerOptions) -> bool:
    """Whether AdaFactor is asked for the warm-up of its own steps, but not for these."""
    given = {name: literal(text) for name, text in options.optimizer_keywords.items()}
    contrary = given.get("warmup_init") is True and given.get("relative_step", True) is not True
    return options.optimizer == "AdaFactor" and contrary


def _start_averaging(optimizer: torch.optim.Optimizer) -> None:
    """Put a schedule-free optimizer where its steps start. ValueError where it could not come back from its average."""
    if "betas" in optimizer.defaults and not 0 < optimizer.defaults["betas"][0] < 1:
        raise ValueError("the first of betas has to be between 0 and 1")
    optimizer.train()


def import_optimizer(options: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """The class of --optimizer_type. UserError if its package is missing or does not work."""
    name, source = options.optimizer, options.source
    kind = import_class(
        f"--optimizer_type {name}", source.module, source.name, source.package, listed=name in OPTIMIZERS
    )
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"--optimizer_type: {name} is no optimizer of PyTorch")
    return kind


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """What tells it from others whose state it could not take: the class, with its module if we do not list it."""
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    listed = {("torch", name) for name in TORCH_OPTIMIZERS}
    listed |= {(row.module.partition(".")[0], row.name) for row in OPTIMIZERS.values()}
    return kind.__name__ if (package, kind.__name__) in listed else f"{kind.__module__}.{kind.__name__}"


def described(options: OptimizerOptions, optimizer: torch.optim.Optimizer) -> str:
    """The class and its arguments as files tell them, such as torch.optim.adamw.AdamW(weight_decay=0.01)."""
    kind = type(optimizer)
    arguments = ",".join(f"{name}={value}" for name, value in keywords_of(options, kind).items())
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({arguments})" if arguments else "")


def _check_factors(name: str, rates: Iterable[float]) -> None:
    """A warning for rates that are not what an optimizer that finds its rate itself multiplies it by."""
    low, high = _USUAL_FACTORS
    for rate in rates:
        if not low <= rate <= high:
            result = "almost nothing" if rate < low else "too much"
            warn(
                f"--optimizer_type {name} finds the learning rate itself and multiplies it by the one given, which is "
                f"usually 1; with {rate:g} it will learn {result}"
            )


def finds_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is an AdaFactor that finds the size of its steps itself."""
    return any(group.get("relative_step") for group in optimizer.param_groups)


def state_bytes(options: OptimizerOptions, parameters: Iterable[Tensor], device: torch.device) -> int:
    """About how many bytes the optimizer keeps of these parameters, which need no values."""

    @functools.cache
    def per_value(shape: tuple[int, ...]) -> float:
        state = _stepped(options, shape, device).state
        return sum(tensor.nbytes for tensor in tensors_in(state)) / math.prod(shape)

    return round(sum(tensor.numel() * per_value(_small(tensor.shape)) for tensor in parameters))


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that takes as much memory per value, on either side of the number of values from which it is less.

    The last two sides are apart from the others in optimizers that keep sums of rows and columns.
    """
    *rest, rows, columns = (1, 1, *shape)
    cut = _ENOUGH**2 // min(rows, columns, _ENOUGH)
    rows, columns = min(rows, cut), min(columns, cut)
    number = min(math.prod(rest), -(-(_ENOUGH**2) // (rows * columns)))
    return (number, rows, columns)[-max(len(shape), 1) :]


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
    AdaFactor's relative step is that before it is multiplied by the size of each parameter (scale_parameter).
    """
    rates = []
    for group, rate in zip(optimizer.param_groups, scheduler_rates, strict=True):
        if group.get("relative_step"):
            rates.append(_relative_step(optimizer, group))
            continue
        warmup = group.get("warmup_steps", 0)
        done = group.get("k", warmup)
        part = (done + 1) / warmup if done < warmup else 1.0
        if "silent_sgd_phase" in group:
            part *= _rectification(group)
        rates.append(float(rate * part * group.get("d", 1.0) / (group.get("g0_norm") or 1.0)))
    return rates


def _relative_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """AdaFactor's next step in relation to the size of its parameters (https://arxiv.org/abs/1804.04235, section 8)."""
    states = (optimizer.state.get(parameter) for parameter in group["params"])
    step = next((state["step"] for state in states if state), 0) + 1
    return min(1e-6 * step if group.get("warmup_init") else 1e-2, step**-0.5)


def _rectification(group: Mapping[str, Any]) -> float:
    """The factor of RAdam's next step (https://arxiv.org/abs/1908.03265, algorithm 2)."""
    step, decay = group["k"] + 1, group["betas"][1]
    longest = 2 / (1 - decay) - 1
    length = longest - 2 * step * decay**step / (1 - decay**step)
    if length <= 4:
        return float(not group["silent_sgd_phase"])
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


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
        for several in _shapes(entry):
            shape = several[len(several) - parameter.dim() :]
            if shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's state of parameter {number} is for the shape {list(shape)}, but it has "
                    f"{list(parameter.shape)}"
                )
    before = {parameter: optimizer.state.get(parameter, {}) for parameter in parameters}
    alone = [group.get(ALONE, False) for group in groups]
    optimizer.load_state_dict(dict(state))
    for group, is_alone in zip(optimizer.param_groups, alone, strict=True):
        group.pop(ALONE, None)
        group |= {ALONE: True} if is_alone else {}  # by the flags of this run, not by those of the state's
    for parameter, entry in zip(parameters, entries.values(), strict=True):
        if entry:
            _put_types_back(optimizer.state[parameter], entry)
        if getattr(optimizer, "is_paged", False):
            _page(optimizer, parameter, before[parameter])


def _page(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, before: Mapping[str, Any]) -> None:
    """Move loaded state to where bitsandbytes keeps that of its paged optimizers, which is there `before` if steps were
    taken: it would else stay in the GPU's memory.
    """
    loaded = optimizer.state[parameter]
    for name in ("state1", "state2"):
        if name in loaded:
            place = before[name] if name in before else optimizer.get_state_buffer(parameter, dtype=loaded[name].dtype)
            loaded[name] = place.copy_(loaded[name])


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer keep what it kept before its first step. Paged memory, which bitsandbytes never gives back, is
    emptied for the next one.
    """
    if not getattr(optimizer, "is_paged", False):
        optimizer.state.clear()
        return
    for entry in optimizer.state.values():
        entry["step"] = 0
        for name, value in entry.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):  # the numbers that 8 bits stand for
                value.zero_()


def _shapes(entry: Mapping[str, Any]) -> Iterator[torch.Size]:
    """Shapes in a parameter's state that must end with its own; bitsandbytes hides quantised state one level down."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _shapes(value)
        elif name in _PARAMETER_SHAPED and isinstance(value, Tensor):
            yield value.shape
        elif name == "exp_avg_sq_row":  # AdaFactor's sums, beside those of columns
            yield value.shape + entry["exp_avg_sq_col"].shape[-1:]


def _put_types_back(loaded: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Replace tensors that loading has cast by the stored ones, on the device where they were loaded to."""
    for name, value in stored.items():
        now = loaded.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
            loaded[name] = value.to(now.device)
        elif isinstance(value, dict) and isinstance(now, dict):
            _put_types_back(now, value)
