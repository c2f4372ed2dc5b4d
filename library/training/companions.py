"""What happens besides training: everything that watches, checks, paints and saves, and the state of all of it."""

import functools
from dataclasses import dataclass

from library.data.report.chart import chart
from library.data.report.summary import summarise
from library.options.ema import EmaOptions
from library.options.huggingface import HubOptions
from library.options.preview import PreviewOptions
from library.options.resume import ResumeOptions
from library.options.saving import SaveOptions
from library.options.scheduler import SchedulerOptions
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions
from library.training import events
from library.training.ema import Ema
from library.training.logs import Continued, open_log
from library.training.methods.base import Method
from library.training.motion import Motion
from library.training.optimization.movement import Movement
from library.training.optimization.planned_rates import show_planned_rates
from library.training.outlook import Outlook
from library.training.preparation import Caches
from library.training.previews import Previewer
from library.training.provenance import Provenance
from library.training.published import published_weights
from library.training.report import before_training
from library.training.requests import Requests
from library.training.resuming import resume
from library.training.resuming.differences import facts
from library.training.resuming.state import TrainState
from library.training.resuming.states import control_file
from library.training.saving import Saver
from library.training.step import TrainingStep
from library.training.tracking import Tracker
from library.training.upload import Uploader
from library.training.validation import SaveBest, StopEarly, Validate, make_validator


@dataclass(frozen=True)
class Companions:
    """What goes along with the loop."""

    tracker: Tracker
    schedule: events.Schedule
    requests: Requests
    movement: Movement
    validate: Validate
    uploader: Uploader


def accompany(run: Outlook, method: Method, step: TrainingStep, caches: Caches, motion: Motion) -> Companions:
    """Make it, and put everything where it was if the run goes on with a state."""
    settings, progress, resumed = run.settings, run.progress, run.resumed
    saving, stepper = settings[SaveOptions], motion.stepper
    movement = Movement(motion.groups, motion.optimizer, resumed=resumed is not None, step=lambda: stepper.number)
    tracker, log = watch(run, method, step, motion)
    state = TrainState(progress, step, facts(run, method, motion.optimizer, motion.groups, log), run.accelerator)
    if resumed:
        resume.restore_trained(resumed, state)
    ema = Ema(step.trained, settings[EmaOptions].ema_decay) if settings[EmaOptions].ema else None
    published = functools.partial(published_weights, method, motion.optimizer, step.trained)
    provenance = Provenance(run, method, step.model, motion.optimizer)
    uploader = Uploader(settings[HubOptions], run.accelerator.num_processes)
    saver = Saver(saving, run.target, method, run.formats.saved, provenance, published, state, tracker, ema, uploader)
    previewer = Previewer(
        settings[PreviewOptions], run.plans.prompts, run.target, step, published, tracker, run.accelerator
    )
    validator = make_validator(run, step, caches, published, method.templates())
    validate = Validate(settings[ValidationOptions], validator, tracker)
    state.objects = {
        **({} if state.is_spread else {"optimizer": motion.optimizer}),
        "scheduler": motion.scheduler,
        "method": method,
        "timesteps": step.objective.timesteps,
        "tracker": tracker,
        "saver": saver,
        "validation": validate,
        "provenance": provenance,
        **({"scaler": run.accelerator.scaler} if run.accelerator.scaler else {}),
        **({"ema": ema} if ema else {}),
    }
    go_on(run, state, motion, tracker, log)
    requests = Requests(control_file(run.plans.output_dir, run.target.name), run.accelerator)
    schedule = events.Schedule(
        [
            events.LearnTimesteps(step.objective.timesteps, run.accelerator),
            *([events.AverageWeights(ema)] if ema else []),
            events.CheckLatents(step, run.table),
            events.CheckMovement(movement),
            validate,
            SaveBest(settings[ValidationOptions], saving, validate, saver.save_as),
            events.Preview(settings[PreviewOptions], previewer),
            events.SaveStep(saving, saver),
            events.SaveEpoch(saving, saver),
            StopEarly(settings[ValidationOptions], validate),
            events.Obey(requests, saver, previewer),
        ],
        at_start=[validate.at_first, previewer.paint_at_first],
        at_end=[saver.save_final],
    )
    return Companions(tracker, schedule, requests, movement, validate, uploader)


def begins_log(run: Outlook, log: Continued) -> bool:
    """Whether a log does not go on with that of a resumed run."""
    return run.log is None or run.log["folder"] != log["folder"]


def go_on(run: Outlook, state: TrainState, motion: Motion, tracker: Tracker, log: Continued) -> None:
    """Put the state's objects where they were if the run goes on with one, and show the rates that are ahead."""
    new_curve, options = False, run.settings[SchedulerOptions]
    if run.resumed:
        new_rates = run.settings[ResumeOptions].resume_new_learning_rate
        new_curve = resume.restore(run.resumed, state, motion, options, new_rates=new_rates)
    if new_curve or begins_log(run, log):
        show_planned_rates(options, motion, run.progress, tracker.log)


def watch(run: Outlook, method: Method, step: TrainingStep, motion: Motion) -> tuple[Tracker, Continued]:
    """The log and the progress bar, and first what is going to be trained on."""
    summary = summarise(run.table, run.plans.datasets, run.plan, run.settings[TrainingOptions].total_steps)
    run.accelerator.print(before_training(summary, run.progress, motion.groups, motion.optimizer, run.accelerator))
    log = open_log(run.settings, method.log_name, run.accelerator, run.progress, run.log)
    importance_of = step.objective.timesteps.importance
    tracker = Tracker(
        run.accelerator,
        step.timesteps_of,
        lambda record: run.table[record].path,
        importance_of,
        method.measured,
    )
    if begins_log(run, log):
        tracker.log.text("dataset", summary.markdown())
        tracker.log.pictures({"dataset": chart(summary)}, run.progress.step)
    return tracker, log
