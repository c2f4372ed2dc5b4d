"""What is known of a run before any weights are read: the model's headers, the images, the batches of every step."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from library import console
from library.data.config import check_resolutions
from library.data.plan import RunPlan
from library.data.records import RecordTable, check_buckets
from library.errors import UserError
from library.models.noise import Prediction
from library.models.registry import ModelInfo
from library.options.base import Settings
from library.options.ema import EmaOptions
from library.options.model import ModelOptions
from library.options.optimizer import OptimizerOptions
from library.options.resume import ResumeOptions
from library.options.saving import SaveOptions
from library.options.scheduler import SchedulerOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions
from library.training import together
from library.training.base_model import Script, inspect_base_model, prediction_for
from library.training.base_weights import BaseNetwork, find_base_networks
from library.training.device import engines
from library.training.device.accelerator import make_accelerator
from library.training.device.precision import Precision
from library.training.logs import Continued
from library.training.methods.base import Method
from library.training.optimization.optimizers import try_optimizer
from library.training.optimization.schedulers import check_length, check_scheduler
from library.training.optimization.steppers import check_stepper
from library.training.preflight import Plans
from library.training.preservation import check_engine
from library.training.resuming import resume
from library.training.resuming.state import Progress
from library.training.resuming.states import StateFolder, note_others
from library.training.shared_scan import scan_together


@dataclass(frozen=True)
class Outlook:
    """A run as it is going to be."""

    settings: Settings
    plans: Plans
    target: Path
    """The final file or folder, without the ending of its format."""
    info: ModelInfo
    prediction: Prediction
    accelerator: Accelerator
    formats: Precision
    resumed: StateFolder | None
    """The state it goes on with."""
    log: Continued | None
    """The log that it goes on with."""
    seed: int
    table: RecordTable
    plan: RunPlan
    progress: Progress
    base_networks: tuple[BaseNetwork, ...] = ()
    """What is merged into the model."""

    @property
    def merged_text(self) -> str:
        """A fingerprint of what is merged into the text encoders; empty for nothing."""
        return "".join(network.text_fingerprint for network in self.base_networks)


def look_ahead(settings: Settings, plans: Plans, method: Method, script: Script) -> Outlook:
    """UserError for whatever can be known by now to go wrong; RunEnded where --resume latest finds nothing to do."""
    info = inspect_base_model(settings, script)
    prediction = prediction_for(settings[ModelOptions], info)
    base_networks = find_base_networks(settings, info)
    check_resolutions(plans.datasets, info.latents.step)
    check_scheduler(settings[SchedulerOptions], settings[OptimizerOptions])
    target = plans.output_dir / settings[SaveOptions].name
    log = plans.resume and plans.resume.facts.get("log")
    accelerator, formats = make_accelerator(settings, info.family, log)
    resumed = resume.agree_on_state(plans.resume)
    method.settle_output(info, target, resumed=resumed and resumed.facts)
    if resumed is None:
        note_older_run(plans.output_dir, settings[SaveOptions].name, method.target(target))
    if settings[EmaOptions].ema and engines.spreads(accelerator):
        raise UserError(
            "--ema needs all weights in each process, which FSDP and DeepSpeed spread: leave one of them out"
        )
    check_engine(plans.datasets, accelerator)
    check_stepper(settings, accelerator)
    try_optimizer(settings[OptimizerOptions], accelerator.device, spread=engines.spreads(accelerator))
    training = settings[TrainingOptions]
    seed = settle_seed(training.seed, resumed)
    table = scan_together(plans.datasets, accelerator)
    method.check_captions(table, plans.datasets)
    check_buckets(table, plans.datasets, info.latents.step)
    settings[ValidationOptions].check(bool(table.validation.any()))
    settings[ValidationOptions].note_unused(bool(table.validation.any()))
    plan = RunPlan(
        table,
        plans.datasets,
        seed=seed,
        accumulation=training.gradient_accumulation_steps,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    total_steps = training.total_steps(plan.steps_per_epoch)
    check_length(settings[SchedulerOptions], settings[OptimizerOptions], total_steps)
    if method.settle_length(total_steps):
        engines.check_stops(accelerator)
    patience = settings[ValidationOptions].stop_after_no_improvement
    progress = resume.start(settings[ResumeOptions], resumed, total_steps, plan.steps_per_epoch, patience)
    return Outlook(
        settings,
        plans,
        target,
        info,
        prediction,
        accelerator,
        formats,
        resumed,
        log,
        seed,
        table,
        plan,
        progress,
        base_networks,
    )


def note_older_run(output_dir: Path, name: str, result: Path) -> None:
    """Say what a new run finds under its name: the result that it replaces, and states that it does not go on with."""
    if result.exists():
        console.notice(f"{result} is there already and is replaced when the run is over")
    note_others(output_dir, name)


def settle_seed(wanted: int | None, resumed: StateFolder | None) -> int:
    """--seed, or that of the run which is resumed, or one drawn by the first process for all of them, and shown."""
    if wanted is not None:
        return wanted
    if resumed and "seed" in resumed.facts:
        return resumed.facts["seed"]
    drawn = together.first_says(secrets.randbelow(2**32))
    console.notice(f"no --seed was given, this run's is {drawn}")
    return drawn
