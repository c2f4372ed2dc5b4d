"""From settings to a finished run: everything is prepared here, in the order in which it depends on each other."""

import secrets

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from library import console
from library.data.config import check_resolutions
from library.data.dataset import BatchLoader, ImageDataset, make_loader
from library.data.plan import PlanSampler, RunPlan
from library.data.records import RecordTable, check_buckets
from library.data.report.chart import chart
from library.data.report.summary import summarise
from library.options.base import Settings
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions
from library.options.model import ModelOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.saving import SaveOptions
from library.options.training import TrainingOptions
from library.training import events, tracking
from library.training.accelerator import make_accelerator
from library.training.base_model import Script, inspect_base_model, prediction_for
from library.training.caching import plan_for_run
from library.training.inspection import show_dataset
from library.training.methods.base import Method, ParameterGroup
from library.training.movement import Movement
from library.training.optimizers import check_optimizer, make_optimizer
from library.training.preflight import Plans
from library.training.preparation import Caches, prepare_caches
from library.training.previews import Previewer
from library.training.provenance import Provenance
from library.training.report import after_training, before_training
from library.training.saving import Saver
from library.training.schedulers import make_scheduler
from library.training.shared_scan import scan_together
from library.training.state import Progress
from library.training.step import TrainingStep
from library.training.stepper import Stepper
from library.training.text_caching import text_options
from library.training.trainer import seed_generators, train


def launch(settings: Settings, plans: Plans, method: Method, script: Script) -> None:
    """Prepare everything in the order of its dependencies, then train."""
    training = settings[TrainingOptions]
    info = inspect_base_model(settings, script)
    prediction = prediction_for(settings[ModelOptions], info)
    check_resolutions(plans.datasets, info.latents.step)
    check_optimizer(settings[OptimizerOptions])

    # Records and plan: what every step will see.
    accelerator, formats = make_accelerator(settings, info.family)
    seed = settle_seed(training.seed, accelerator)
    table, plan = plan_run(training, plans, seed, accelerator)
    check_buckets(table, plans.datasets, info.latents.step)
    total_steps = training.total_steps(plan.steps_per_epoch)
    progress = Progress(total_steps, total_epochs=-(-total_steps // plan.steps_per_epoch))
    if settings[DatasetOptions].debug_dataset:
        show_dataset(settings, plans, info, table, plan)
        return

    # Model, caches, and what is trained.
    caching = plan_for_run(settings[CacheOptions], info, table, plans.datasets)
    cached = caching is not None and not caching.missing
    model = info.load(formats.frozen, accelerator.device, formats.vae, vae_device="cpu" if cached else None)
    model.prediction = prediction
    model.read_captions(text_options(settings[ModelOptions]))
    caches = prepare_caches(settings[CacheOptions], caching, info, model, table, plans.datasets, accelerator)
    seed_generators(seed, "first weights")
    step = TrainingStep(model, method.build(model), model.noise_process())
    groups = method.parameter_groups()
    train_only(step, groups)
    if settings[PrecisionOptions].gradient_checkpointing:
        model.enable_gradient_checkpointing(unet=True, text_encoders=method.trains_text_encoder())
        method.enable_gradient_checkpointing()

    # What moves it.
    optimizer = make_optimizer(settings[OptimizerOptions], groups)
    scheduler = make_scheduler(settings[OptimizerOptions], optimizer, total_steps)
    movement = Movement(groups, optimizer)
    root, prepared = accelerator.prepare(step, optimizer)
    names = [group.name for group in groups]
    stepper = Stepper(accelerator, root, prepared, scheduler, names, settings[OptimizerOptions].clip_norm)

    # What it is fed with, and what happens besides.
    loader = load_batches(settings, plans, plan, caches, info.latents.factor, progress, accelerator)
    summary = summarise(table, plans.datasets, plan, training.total_steps)
    accelerator.print(before_training(summary, progress, groups, accelerator))
    provenance = Provenance(method, settings, seed, formats.mixed, info, model, table, plans.datasets, plan, optimizer)
    tracker = tracking.start(settings[LogOptions], method.log_name, accelerator, progress)
    tracker.log_text("dataset", summary.markdown())
    tracker.log_pictures({"dataset": chart(summary)}, progress.step)
    target = plans.output_dir / settings[SaveOptions].name
    saver = Saver(settings[SaveOptions], target, method, step, formats.saved, provenance, tracker, accelerator)
    previewer = Previewer(settings[PreviewOptions], plans.prompts, target, method, step, tracker, accelerator)
    schedule = events.Schedule(
        [
            events.CheckLatents(step, table),
            events.CheckMovement(movement),
            events.Preview(settings[PreviewOptions], previewer),
            events.SaveStep(settings[SaveOptions], saver),
            events.SaveEpoch(settings[SaveOptions], saver),
        ],
        at_start=[previewer.paint_at_first],
        at_end=[tracker.finish, saver.save_final],
    )
    train(
        loader=loader,
        root=root,
        method=method,
        stepper=stepper,
        schedule=schedule,
        tracker=tracker,
        progress=progress,
        seed=seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    loader.failures.update(gather_object(sorted(loader.failures)))  # each process has met its own
    accelerator.print(after_training(movement, loader.left_out))
    # The wrapper of several processes goes before their connection: Gloo hangs when it is taken down along with it.
    del root, stepper
    accelerator.free_memory()
    accelerator.end_training()


def plan_run(
    training: TrainingOptions, plans: Plans, seed: int, accelerator: Accelerator
) -> tuple[RecordTable, RunPlan]:
    """What there is to train on, and which of it every step of this process sees."""
    table = scan_together(plans.datasets, accelerator)
    plan = RunPlan(
        table,
        plans.datasets,
        seed=seed,
        accumulation=training.gradient_accumulation_steps,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    return table, plan


def load_batches(
    settings: Settings,
    plans: Plans,
    plan: RunPlan,
    caches: Caches,
    latent_factor: int,
    progress: Progress,
    accelerator: Accelerator,
) -> BatchLoader:
    """This process's batches of the steps that are left."""
    dataset = ImageDataset(
        plan.table,
        plans.datasets,
        caches.latents,
        caches.text,
        latent_factor=latent_factor,
        masked_loss=settings[DatasetOptions].masked_loss,
        prior_loss_weight=settings[TrainingOptions].prior_loss_weight,
        total_steps=progress.total_steps,
    )
    sampler = PlanSampler(plan, progress.step, progress.total_steps)
    workers = settings[LoaderOptions].workers
    return make_loader(dataset, sampler, workers, pin_memory=accelerator.device.type == "cuda")


def train_only(step: nn.Module, groups: list[ParameterGroup]) -> None:
    """Ask for gradients of what the optimizer will move and of nothing else."""
    step.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)


def settle_seed(wanted: int | None, accelerator: Accelerator) -> int:
    """--seed, or one drawn by the first process for all of them, and shown."""
    if wanted is not None:
        return wanted
    drawn = broadcast_object_list([secrets.randbelow(2**32)])[0]
    console.notice(f"no --seed was given, this run's is {drawn}")
    return drawn
