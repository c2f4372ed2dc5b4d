"""The loss on held-out images: how it is measured, what is kept of it, and what follows from it."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from library.bars import progress_bar
from library.console import notice, warn
from library.data.batch import Batch
from library.data.caching.cache import LatentsCache, make_latents
from library.data.caching.latents_plan import State, plan_latents
from library.data.config import DatasetConfig
from library.data.dataset import ImageDataset
from library.data.held_out import held_out_batches, steady
from library.data.plan import BatchPlan
from library.errors import UserError
from library.generation.paint import evaluating
from library.models.noise import sample_noise
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from library.options.saving import SaveOptions
from library.options.validation import ValidationOptions
from library.randomness import address
from library.training import together
from library.training.caching import latents_layout, vae_encoder
from library.training.device import engines
from library.training.events import every
from library.training.health import NotFinite
from library.training.outlook import Outlook
from library.training.preparation import Caches
from library.training.published import Published
from library.training.requests import RunEnded
from library.training.resuming.state import Progress
from library.training.saving import all_finite
from library.training.step import TrainingStep
from library.training.tracking import RANGES, Tracker

# --- measuring ---


@dataclass(frozen=True)
class ValidationLoss:
    """Means over the held-out images, each of which counts the same."""

    mean: float
    by_range: dict[str, float]
    """The same of each range of timesteps, named as in `000-249`"""


class Validator:
    """Measures the loss on held-out images: a function of the weights, the images and their validation_seed alone.

    Each image is looked at once in every range of timesteps: at early ones the loss is many times that at late ones,
    and with one timestep drawn from all of them the mean would tell which were drawn. A batch then costs about as much
    as a training step.
    """

    def __init__(
        self,
        step: TrainingStep,
        dataset: ImageDataset,
        batches: Sequence[BatchPlan],
        published: Published,
        accelerator: Accelerator,
    ):
        """`dataset` gives all processes' `batches`, whose records have cached latents."""
        self.step = step
        self.dataset = dataset
        self.batches = batches
        self.published = published
        self.accelerator = accelerator

    @property
    def images(self) -> int:
        """How many images are looked at."""
        return sum(len(plan.items) for plan in self.batches)

    @property
    def fingerprint(self) -> int:
        """Of what is looked at, and of the loss: values of different fingerprints do not compare."""
        seen = sorted((item.seed, *plan.bucket) for plan in self.batches for item in plan.items)
        loss = self.step.objective.fingerprint
        masks = ["masks"] if self.dataset.uses_masks else []
        return address(len(RANGES), *(number for image in seen for number in image), *loss, *masks)

    def measure(self) -> ValidationLoss:
        """The loss now; all processes take part and get the same. Weights, modes and global generators stay as they
        are. An image whose loss is not finite is left out, with a warning. UserError if no image is left, NotFinite
        if the weights are not finite.
        """
        rows = self._rows().double().cpu().numpy()
        losses, usable = rows[:, :-1], rows[:, -1] > 0
        if not usable.any():
            raise UserError("none of the held-out images can be read: set validation_split to 0")
        finite = np.isfinite(losses).all(axis=1)
        if not finite.all():
            self._judge_wrong(np.flatnonzero(~finite).tolist())
            usable &= finite
        count = int(usable.sum())
        if not count:
            raise UserError(
                "the validation loss of no held-out image is finite, so the run ends: lower the learning rate, or, if "
                "it was so from the start, use --no_half_vae, another --mixed_precision, or another model file"
            )
        # exact sums of each image's mean, so that no order of the images shows
        means = [math.fsum(column) / count for column in losses[usable].T.tolist()]
        return ValidationLoss(math.fsum(means) / len(means), dict(zip(RANGES, means, strict=True)))

    def _judge_wrong(self, numbers: list[int]) -> None:
        """Warn about these images, whose losses are not finite; NotFinite if the weights are to blame."""
        if not all_finite(self.step.trained):
            raise NotFinite("the weights are no longer finite, so the run ends: lower the learning rate")
        records = [item.record for plan in self.batches for item in plan.items]
        for number in numbers:
            path = self.dataset.table[records[number]].path
            warn(f"{path}: the validation loss of this image is not finite, so it is left out of the mean")

    @torch.no_grad()
    def _rows(self) -> Tensor:
        """(images, ranges + 1) float32: each image's losses, and whether it could be read."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        rows = torch.zeros(self.images, len(RANGES) + 1, device=device)
        starts = np.cumsum([0, *(len(plan.items) for plan in self.batches)]).tolist()
        share = list(zip(self.batches, starts[:-1], starts[1:], strict=True))[rank::world]
        bar = progress_bar(
            share, desc="validating", unit="batch", delay=2, leave=False, dynamic_ncols=True, disable=rank > 0
        )
        with untouched_generators(device), self.published(), engines.whole_weights(self.step), evaluating(self.step):
            for plan, start, stop in bar:
                batch = self.dataset[plan]
                for failure in batch.failures.values():
                    warn(failure, of_any_process=True)
                rows[start:stop] = self._losses(batch.to(device))
        return self.accelerator.reduce(rows, "sum")  # the rows of other processes are zeros here

    def _losses(self, batch: Batch) -> Tensor:
        """(B, ranges + 1) as above. One range after the other, so that it takes no more memory than training."""
        columns = []
        with self.accelerator.autocast():
            latents = self.step.latents_of(batch)
            if batch.text is None:
                batch = replace(batch, text=self.step.model.encode_text(batch.captions))
            for number, (low, high) in enumerate(RANGES.values()):
                seeds = [address(seed, number) for seed in batch.seeds]
                timesteps = self.step.noise.sample_timesteps(seeds, low, high).to(latents.device)
                noise = sample_noise(latents.shape[1:], seeds).to(latents.device)
                columns.append(self.step.losses(batch, latents, noise, timesteps))
        return torch.stack([*columns, batch.weights], dim=1)


@contextlib.contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """The global generators of Python, NumPy and torch leave as they came, whatever a network draws meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def make_validator(
    run: Outlook, step: TrainingStep, caches: Caches, published: Published, templates: Sequence[str] = ()
) -> Validator:
    """For the images that are held out, maybe none. Encodes them now where their latents are not cached.

    `templates` take the place of their captions. `published` gives a context in which the weights are those to be
    measured.
    """
    settings, table = run.settings, run.table
    datasets = [steady(dataset) for dataset in run.plans.datasets]
    batches = held_out_batches(table, datasets, settings[ValidationOptions].max_validation_steps)
    latents = caches.latents
    if latents is None and batches:
        latents = _encode(run, step, datasets, batches)
    dataset = ImageDataset(
        table,
        datasets,
        latents,
        caches.text,
        latent_factor=run.info.latents.factor,
        masked_loss=settings[DatasetOptions].masked_loss,
        templates=templates,
    )
    return Validator(step, dataset, batches, published, run.accelerator)


def _encode(
    run: Outlook, step: TrainingStep, datasets: Sequence[DatasetConfig], batches: Sequence[BatchPlan]
) -> LatentsCache:
    """Latents of the batches' images, drawn as --cache_latents draws them; each process makes its own."""
    table, options = run.table, run.settings[CacheOptions]
    plan = plan_latents(table, datasets, latents_layout(run.info), skip_check=options.skip_cache_check)
    needed = np.zeros(len(table), dtype=bool)
    needed[[item.record for batch in batches for item in batch.items]] = True
    plan.states[~needed] = State.UNUSED
    with engines.whole_weights(step):
        latents = make_latents(plan, vae_encoder(step.model), batch_size=options.vae_batch_size)
    together.wait()
    return latents


# --- what is kept of it ---


class History:
    """The validation losses of a run, and which was the best. What was measured before training does not compete."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        """By the number of steps done."""
        self.unsaved: set[int] = set()
        """After which of them a file that was to be the best could not be written."""

    @property
    def best_step(self) -> int | None:
        """After which step the loss was lowest, the first of equals; None while nothing was trained."""
        return min((step for step in self.losses if step), key=self.losses.__getitem__, default=None)

    def is_to_be_saved(self, step: int) -> bool:
        """Whether the loss after a step is lower than that of all files of the best before."""
        before = [loss for other, loss in self.losses.items() if 0 < other < step and other not in self.unsaved]
        return self.losses[step] < min(before, default=math.inf)

    @property
    def since_best(self) -> int:
        """How many validations came after the best."""
        return sum(step > (self.best_step or 0) for step in self.losses)

    def __str__(self) -> str:
        best, last = self.best_step, max(self.losses, default=None)
        parts = [f"{self.losses[0]:.4f} before training"] if 0 in self.losses else []
        if best is not None:
            parts += [f"{self.losses[best]:.4f} after step {best}, the best"]
        if last != best and last:
            parts += [f"{self.losses[last]:.4f} after step {last}"]
        return f"validation loss: {', '.join(parts)}" if parts else ""


# --- events ---


def measures(options: ValidationOptions, progress: Progress) -> bool:
    """Whether the loss on held-out images is due after the step just done."""
    by_epochs = progress.epoch_ended and every(options.epoch_interval, progress.epoch)
    return by_epochs or every(options.step_interval, progress.step) or progress.finished


class Validate:
    """The loss on the held-out images, if there are any: into the log and the history, after every interval and after
    the last step. All processes take part.
    """

    def __init__(self, options: ValidationOptions, validator: Validator, tracker: Tracker):
        self.options = options
        self.validator = validator
        self.tracker = tracker
        self.history = History()

    def at_first(self, progress: Progress) -> None:
        """What the model that is trained on can do, before the first step; a resumed run knows it."""
        if self.validator.images and progress.step == 0:
            self(progress)

    def due(self, progress: Progress) -> bool:
        return bool(self.validator.images) and measures(self.options, progress)

    def __call__(self, progress: Progress) -> None:
        loss = self.validator.measure()
        self.history.losses[progress.step] = loss.mean
        ranges = {f"loss/validation/{name}": value for name, value in loss.by_range.items()}
        self.tracker.log.scalars({"loss/validation": loss.mean, **ranges}, progress.step)

    def state_dict(self) -> dict[str, Any]:
        unsaved = sorted(self.history.unsaved)
        return {"losses": dict(self.history.losses), "unsaved": unsaved, "of": self.validator.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the losses of a state; if they are of other images, they count no more, with a notice."""
        if state["of"] == self.validator.fingerprint:
            self.history.losses = dict(state["losses"])
            self.history.unsaved = set(state.get("unsaved", ()))
        elif state["losses"]:
            notice(
                "the held-out images or the loss are not those of the state, so the search for the best weights starts "
                "anew"
            )


class SaveBest:
    """Where --save_best asks for it, `<output_name>-best` after a validation that is the best so far, those aside whose
    file could not be written. Comes after `validate`, and before whatever stores its state.
    """

    def __init__(
        self,
        options: ValidationOptions,
        saving: SaveOptions,
        validate: Validate,
        save_as: Callable[[str, Progress], bool],
    ):
        """`save_as` writes a file of a stem, tells whether it could, and is called in all processes."""
        self.wanted = options.save_best
        self.stem = saving.best_stem
        self.validate = validate
        self.save_as = save_as

    def due(self, progress: Progress) -> bool:
        return self.wanted and self.validate.due(progress)

    def __call__(self, progress: Progress) -> None:
        history = self.validate.history
        if history.is_to_be_saved(progress.step) and not self.save_as(self.stem, progress):
            history.unsaved.add(progress.step)


class StopEarly:
    """The end of a run whose last --stop_after_no_improvement validations were no better than the best. Comes last."""

    def __init__(self, options: ValidationOptions, validate: Validate):
        self.patience = options.stop_after_no_improvement
        self.validate = validate

    def due(self, progress: Progress) -> bool:
        return self.patience is not None and self.validate.due(progress) and not progress.finished

    def __call__(self, progress: Progress) -> None:
        """Raises RunEnded where it is time."""
        history = self.validate.history
        if history.since_best >= self.patience:
            progress.stopped_by = self.patience
            raise RunEnded(f"the last {history.since_best} validations were no improvement ({history})", complete=True)
