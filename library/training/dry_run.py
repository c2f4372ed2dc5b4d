"""--dry_run: a run as it would be, from the headers of its model alone. Writes nothing."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from library import console
from library.data.report.summary import summarise
from library.errors import UserError
from library.models import float8
from library.models.family import Family
from library.options.cache import CacheOptions
from library.options.ema import EmaOptions
from library.options.memory import MemoryOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions
from library.training import events
from library.training.device import engines
from library.training.device.frozen import parts_in_8_bits
from library.training.device.placement import place
from library.training.methods.base import Method, ParameterGroup
from library.training.optimization.fused import divide_evenly
from library.training.optimization.optimizers import make_optimizer, state_bytes
from library.training.outlook import Outlook
from library.training.previews import with_seed
from library.training.report import before_training
from library.training.resuming import resume
from library.training.resuming.differences import facts
from library.training.resuming.packing import raw
from library.training.resuming.state import Progress
from library.training.resuming.states import SUFFIX
from library.training.retention import all_series
from library.training.text_caching import text_options
from library.training.validation import measures

_SHOWN = 4  # of a list of steps
_FLOAT32 = 4  # bytes
_TITLES = {
    "epochs": "files by epochs",
    "steps": "files by steps",
    "states of epochs": "states by epochs",
    "states of steps": "states by steps",
}


def show_run(run: Outlook, method: Method) -> None:
    """Print what would be trained, how long, what would be written when, and what that takes. UserError for what only
    shows when the model is put together.
    """
    model = run.info.outline()
    model.prediction = run.prediction
    model.read_captions(text_options(run.settings))
    try:
        trained = method.build(model)
    except NotImplementedError as error:  # as torch says where a value is missing
        raise UserError(
            "--dry_run: what is to be trained cannot be put together without the model's weights, leave it out"
        ) from error
    groups = method.parameter_groups()
    optimizer = make_optimizer(run.settings[OptimizerOptions], groups)
    if run.resumed:
        resume.foresee(run.resumed, trained, facts(run, method, optimizer, groups, run.log), run.progress.step)
    sizes = estimate(run, method, model, trained, groups)
    summary = summarise(run.table, run.plans.datasets, run.plan, run.settings[TrainingOptions].total_steps)
    lines = [
        before_training(summary, run.progress, groups, optimizer, run.accelerator),
        *_of_memory(run, sizes),
        "",
        *_of_files(run, method, sizes),
        "",
        "this was a dry run: no weights were read and nothing was written",
    ]
    run.accelerator.print("\n".join(lines))


# --- memory ---


@dataclass(frozen=True)
class Sizes:
    """Bytes."""

    parts: dict[str, int]
    """Of the model's weights, by component."""
    network: int
    """What is trained beside the model."""
    gradients: int
    optimizer: int
    average: int
    """--ema"""
    saved: int
    """A file of what is trained; that of the moving average is as large."""
    state: int

    @property
    def in_all(self) -> int:
        return sum(self.parts.values()) + self.network + self.gradients + self.optimizer + self.average


def estimate(
    run: Outlook, method: Method, model: Family, trained: nn.Module, groups: Sequence[ParameterGroup]
) -> Sizes:
    """What the run takes of each process's memory from its first step on, and of the disk. No tensor needs values."""
    formats, parts, components = run.formats, {}, model.components()
    trained_size = formats.trained.itemsize
    rounded = parts_in_8_bits(run.settings[PrecisionOptions], method, components)
    for name, component in components.items():
        dtype = formats.vae if component.module is model.vae else formats.frozen
        parts[name] = _values(component.module) * (trained_size if method.is_trained(name) else dtype.itemsize)
        if name in rounded:
            parts[name] -= float8.values(component.module) * (dtype.itemsize - float8.FORMAT.itemsize)
    moved = [parameter for group in groups for parameter in group.parameters]
    count = sum(parameter.numel() for parameter in moved)
    optimizer = state_bytes(run.settings[OptimizerOptions], moved, run.accelerator.device)
    average = _FLOAT32 * count if run.settings[EmaOptions].ema else 0
    beside = method.saved(model, trained) is trained
    return Sizes(
        parts=parts,
        network=trained_size * _values(trained) if beside else 0,
        gradients=trained_size * held_at_once(run.settings[MemoryOptions], moved),
        optimizer=optimizer,
        average=average,
        saved=formats.saved.itemsize * _values(method.saved(model, trained)),
        state=trained_size * _values(trained) + optimizer + average,
    )


def held_at_once(options: MemoryOptions, parameters: Sequence[nn.Parameter]) -> int:
    """How many values the gradients have that wait for each other."""
    sets = [list(parameters)]
    if options.fused:
        sets = divide_evenly(sets[0], options.fused_optimizer_groups or len(parameters))
    return max(sum(parameter.numel() for parameter in members) for members in sets)


def _values(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in raw(module).values())


def _of_memory(run: Outlook, sizes: Sizes) -> Iterator[str]:
    caching, device = run.settings[CacheOptions], run.accelerator.device
    placement = place(run.settings[MemoryOptions], caching, latents=caching.latents)
    yield "memory that each process needs before anything is computed, about:"
    for name, size in sizes.parts.items():
        idle = placement.vae_rests if name == "vae" else name != "unet" and placement.text_encoders_rest
        yield _row(f"{name}{', only while it is needed' if idle else ''}", size)
    names = {
        "network": sizes.network,
        "gradients": sizes.gradients,
        f"state of {run.settings[OptimizerOptions].optimizer}": sizes.optimizer,
        "moving average": sizes.average,
    }
    yield from (_row(name, size) for name, size in names.items() if size)
    yield _row("in all", sizes.in_all)
    yield f"{_shown(_free_memory(device))} are free on {device}. What computing takes comes on top, and may be more"
    yield "than all of this: it depends on sizes, batches and kernels, and is tried in the rehearsal of every run."
    if engines.spreads(run.accelerator):
        yield f"{engines.engine(run.accelerator)} spreads a part of it over the processes."


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _row(name: str, size: int) -> str:
    return f"  {name:<40}{_shown(size):>10}"


def _shown(size: int) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            break
        size, unit = size / 1024, {"bytes": "KB", "KB": "MB", "MB": "GB"}[unit]
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"


# --- files ---


@dataclass
class Written:
    """Files and folders of one kind: those of a number of a series, or pictures."""

    what: str
    steps: list[int]
    """After which steps."""
    paths: list[list[Path]]
    """What is written after each of them."""
    staying: set[int]
    """The steps whose files are there at the end."""
    each: int = 0
    """Bytes after each step; 0 for what is small."""
    replaces: bool = False
    """Whether there is a file or folder of that name now."""

    @property
    def at_the_end(self) -> int:
        return len(self.staying) * self.each


def course(progress: Progress, steps_per_epoch: int) -> Iterator[Progress]:
    """Where the run stands after each step that is left. It is one object, which moves on."""
    at = dataclasses.replace(progress)
    for step in range(progress.step + 1, progress.total_steps + 1):
        at.step, at.epoch, at.epoch_ended = step, -(-step // steps_per_epoch), step % steps_per_epoch == 0
        yield at


def planned(run: Outlook, method: Method, sizes: Sizes) -> list[Written]:
    """All that the run would write if nothing is asked of it meanwhile and no state of before had files to remove."""
    options, beside = run.settings[SaveOptions], run.target.with_name
    averages = _averages(run)
    series = all_series(options)
    found = {name: Written(_TITLES[name], [], [], set(), sizes.state) for name in series}
    for kind in ("epochs", "steps"):
        found[kind].each = sizes.saved * len(averages)
    pictures = Written("previews", [], [], set())

    def save(kind: str, stem: str, number: int, step: int) -> None:
        models = [method.target(beside(f"{stem}{average}")) for average in averages]
        states = [(f"states of {kind}", [beside(f"{stem}{SUFFIX}")])] if options.save_state else []
        for name, paths in ((kind, models), *states):
            own = found[name]
            series[name].add(number, [str(step)])
            for old in series[name].outdated(list(series[name].written), number):
                own.staying.discard(int(series[name].written.pop(old)[0]))
            own.steps.append(step)
            own.paths.append(paths)
            if number in series[name].written:
                own.staying.add(step)

    for at in course(run.progress, run.plan.steps_per_epoch):
        if run.plans.prompts and events.paints(run.settings[PreviewOptions], at):
            _add_pictures(pictures, run, at, events.preview_stamp(run.settings[PreviewOptions], at))
        if events.saves_step(options, at):
            save("steps", options.step_stem(at.step), at.step, at.step)
        if events.saves_epoch(options, at):
            save("epochs", options.epoch_stem(at.epoch), at.epoch, at.step)
    end = run.progress.total_steps
    models = [method.target(beside(f"{run.target.name}{average}")) for average in averages]
    replaces = any(path.exists() for path in models)
    last = [Written("result", [end], [models], {end}, sizes.saved * len(averages), replaces)]
    if options.save_state or options.save_state_on_train_end:
        last.append(Written("last state", [end], [[beside(f"{run.target.name}{SUFFIX}")]], {end}, sizes.state))
    if run.settings[PreviewOptions].sample_at_first and run.plans.prompts and run.progress.step == 0:
        first = Written("first previews", [], [], set())
        _add_pictures(first, run, run.progress, f"{0:06d}")
        last.append(first)
    return [one for one in (*found.values(), pictures, *last) if one.steps]


def _averages(run: Outlook) -> list[str]:
    """How the names of what is saved at once end."""
    return ["", "-ema"] if run.settings[EmaOptions].ema else [""]


def _add_pictures(pictures: Written, run: Outlook, at: Progress, stamp: str) -> None:
    seeds = [with_seed(prompt, number).seed for number, prompt in enumerate(run.plans.prompts)]
    names = [f"{run.target.name}_{stamp}_{number:02d}_<time>_{seed}.png" for number, seed in enumerate(seeds)]
    pictures.steps.append(at.step)
    pictures.paths.append([run.target.parent / "sample" / name for name in names])
    pictures.staying.add(at.step)


def _of_files(run: Outlook, method: Method, sizes: Sizes) -> Iterator[str]:
    written = planned(run, method, sizes)
    yield f"written to {run.target.parent}:"
    for one in written:
        yield from _of_kind(one, run.target.parent)
    yield from _of_validation(run, method, sizes)
    stays = sum(one.at_the_end for one in written)
    stays += sizes.saved * len(_averages(run)) * run.settings[ValidationOptions].save_best
    besides = max((one.each for one in written), default=0)
    folder = next(path for path in (run.target.parent, *run.target.parent.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    most = stays + besides
    yield f"this takes about {_shown(stays)} of the disk, and up to {_shown(most)} on the way, because what is new is"
    yield f"written before what it replaces is removed; {_shown(free)} are free"
    if most > free:
        console.warn(
            f"{folder} has too little space: keep fewer files with --save_last_n_epochs or --save_last_n_steps"
        )


def _of_kind(one: Written, folder: Path) -> Iterator[str]:
    steps = ", ".join(_few([str(step) for step in one.steps]))
    stay = f", {len(one.staying)} of them stay" if len(one.staying) < len(one.steps) else ""
    size = f", {_shown(one.each)}{' each time' * (len(one.steps) > 1)}" if one.each else ""
    old = ", in place of what is there now" if one.replaces else ""
    yield f"  {one.what}: after step{'s' * (len(one.steps) > 1)} {steps}{stay}{size}{old}"
    names = [str(path.relative_to(folder)) for paths in one.paths for path in paths]
    yield from (f"    {name}" for name in _few(names))


def _few(words: Sequence[str]) -> Sequence[str]:
    """The first ones and the last of many."""
    return words if len(words) <= _SHOWN + 2 else [*words[:_SHOWN], "...", words[-1]]


def _of_validation(run: Outlook, method: Method, sizes: Sizes) -> Iterator[str]:
    options = run.settings[ValidationOptions]
    if not run.table.validation.any():
        return
    steps = [at.step for at in course(run.progress, run.plan.steps_per_epoch) if measures(options, at)]
    first = "before the first step and " if run.progress.step == 0 else ""
    yield f"  loss on held-out images: {first}after steps {', '.join(_few([str(step) for step in steps]))}"
    if options.save_best:
        size = _shown(sizes.saved * len(_averages(run)))
        yield f"  best: after each of them that is the best so far, {size} each time"
        for average in _averages(run):
            yield f"    {method.target(run.target.with_name(run.settings[SaveOptions].best_stem + average)).name}"
