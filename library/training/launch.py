"""From settings to a finished run: everything is prepared here, in the order in which it depends on each other."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from library import console
from library.data.dataset import BatchLoader, ImageDataset, make_loader
from library.data.plan import PlanSampler
from library.options.attention import AttentionOptions
from library.options.base import Settings
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from library.options.loader import LoaderOptions
from library.options.memory import MemoryOptions
from library.options.objective import ObjectiveOptions
from library.options.precision import PrecisionOptions
from library.options.rehearsal import RehearsalOptions
from library.options.training import TrainingOptions
from library.training import together
from library.training.base_model import Script
from library.training.base_weights import merge_base_networks
from library.training.caching import plan_for_run
from library.training.companions import Companions, accompany
from library.training.device import determinism, engines
from library.training.device.compilation import compile_blocks, settle_backend
from library.training.device.frozen import check_8_bits, not_exchanged, round_to_8_bits
from library.training.device.hardware import choose_attention
from library.training.device.norms import keep_from_crashing
from library.training.device.offload import offload_checkpoints
from library.training.device.placement import Placement, place
from library.training.dry_run import show_run
from library.training.inspection import show_dataset
from library.training.methods.base import Method
from library.training.motion import Motion, set_in_motion
from library.training.outlook import Outlook, look_ahead
from library.training.preflight import Plans
from library.training.preparation import Caches, prepare_caches
from library.training.rehearsal import rehearse
from library.training.report import after_training
from library.training.requests import RunEnded
from library.training.step import TrainingStep
from library.training.text_caching import text_options
from library.training.trainer import seed_generators, train


@together.shared_fate()
@determinism.explained()
def launch(settings: Settings, plans: Plans, method: Method, script: Script) -> int:
    """Prepare everything in the order of its dependencies, then train. Returns the program's exit status."""
    determinism.settle(settings[TrainingOptions].deterministic)
    try:
        run = look_ahead(settings, plans, method, script)
    except RunEnded as end:
        console.notice(str(end))
        return end.status
    if settings[RehearsalOptions].dry_run:
        show_run(run, method)
        run.accelerator.end_training()
        return 0
    if settings[DatasetOptions].debug_dataset:
        show_dataset(settings, plans, run.info, run.table, run.plan, method)
        return 0
    step, caches, placement = build(run, method)
    motion = set_in_motion(run, method, step)
    if not engines.spreads(run.accelerator):
        placement.rest(step.model)  # engines bring everything to the device
    dataset = make_dataset(run, method, caches)
    if not (settings[RehearsalOptions].no_rehearsal or run.progress.finished):
        rehearse(run, method, step, motion, dataset)
    loader = load_batches(run, dataset)
    companions = accompany(run, method, step, caches, motion)
    status = train_to_the_end(run, method, motion, loader, companions)
    loader.failures.update(*together.gather(loader.failures))  # each process has met its own
    run.accelerator.print(after_training(companions.movement, loader.left_out, str(companions.validate.history)))
    # The wrapper of several processes goes before their connection: Gloo hangs when it is taken down along with it.
    del motion, companions
    run.accelerator.free_memory()
    run.accelerator.end_training()
    return status


def build(run: Outlook, method: Method) -> tuple[TrainingStep, Caches, Placement]:
    """The model with what is trained in it, what was computed while all of it was on the device, and what of it the
    steps do without.
    """
    settings, info, accelerator = run.settings, run.info, run.accelerator
    memory, precision = settings[MemoryOptions], settings[PrecisionOptions]
    check_8_bits(precision, method, accelerator)
    backend = settle_backend(settings[AttentionOptions], accelerator.device)
    caching = plan_for_run(settings[CacheOptions], info, run.table, run.plans.datasets)
    placement = place(memory, settings[CacheOptions], latents=caching is not None)
    vae_device = "cpu" if placement.vae_rests and not caching.missing else None
    formats = run.formats
    exact = method.is_trained if formats.trained == torch.float32 else lambda component: False
    model = info.load(formats.frozen, accelerator.device, formats.vae, vae_device, exact=exact)
    model.prediction = run.prediction
    model.read_captions(text_options(settings))
    merge_base_networks(run.base_networks, model)
    choose_attention(settings[AttentionOptions], model, run.formats, accelerator.device)
    caches = prepare_caches(
        settings[CacheOptions],
        caching,
        info,
        model,
        run.table,
        run.plans.datasets,
        accelerator,
        placement,
        merged_text=run.merged_text,
    )
    round_to_8_bits(precision, method, model)
    seed_generators(run.seed, "first weights")
    trained = in_format(method.build(model), formats.trained)
    if accelerator.device.type == "cpu":
        keep_from_crashing(model, trained)
    step = TrainingStep(model, trained, model.noise_process(), settings[ObjectiveOptions], method.preservation())
    not_exchanged(step)
    if memory.gradient_checkpointing:
        model.enable_gradient_checkpointing(unet=True, text_encoders=method.trains_text_encoder())
        method.enable_gradient_checkpointing()
        if memory.cpu_offload_checkpointing:
            offload_checkpoints(model)
    if backend is not None:
        compile_blocks(model.unet, backend)
    return step, caches, placement


def in_format(trained: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What is trained, with its parameters in this type. Buffers are constants, which have theirs."""
    for parameter in trained.parameters():
        parameter.data = parameter.data.to(dtype)
    return trained


def make_dataset(run: Outlook, method: Method, caches: Caches) -> ImageDataset:
    """What makes a plan of the run's a batch."""
    return ImageDataset(
        run.table,
        run.plans.datasets,
        caches.latents,
        caches.text,
        latent_factor=run.info.latents.factor,
        masked_loss=run.settings[DatasetOptions].masked_loss,
        prior_loss_weight=run.settings[TrainingOptions].prior_loss_weight,
        total_steps=run.progress.total_steps,
        templates=method.templates(),
    )


def load_batches(run: Outlook, dataset: ImageDataset) -> BatchLoader:
    """This process's batches of the steps that are left."""
    sampler = PlanSampler(run.plan, run.progress.step, run.progress.total_steps)
    workers = run.settings[LoaderOptions].workers
    return make_loader(dataset, sampler, workers, pin_memory=run.accelerator.device.type == "cuda")


def train_to_the_end(run: Outlook, method: Method, motion: Motion, loader: BatchLoader, companions: Companions) -> int:
    """The loop, and what comes after its last step. Returns the program's exit status."""
    ended = None
    with companions.requests.listening(), companions.tracker.shown(run.progress), seen_off(companions):
        companions.schedule.start(run.progress)
        try:
            train(
                loader=loader,
                root=motion.root,
                method=method,
                stepper=motion.stepper,
                schedule=companions.schedule,
                tracker=companions.tracker,
                progress=run.progress,
                seed=run.seed,
                device=run.accelerator.device,
                rank=run.accelerator.process_index,
                world=run.accelerator.num_processes,
            )
        except RunEnded as end:
            ended = end
        companions.requests.no_more_steps()
        if ended is None or ended.complete:
            companions.schedule.finish(run.progress)
    if ended is not None:
        console.notice(str(ended))
    return ended.status if ended else 0


@contextmanager
def seen_off(companions: Companions) -> Iterator[None]:
    """What is logged and uploaded while it lasts arrives, or is said not to. The error that ends the run stays."""
    tracker, uploader = companions.tracker, companions.uploader
    try:
        yield
        tracker.finish()
        uploader.finish()
    except BaseException:
        for finish in (tracker.flush, tracker.log.flush, uploader.finish):  # Weights & Biases itself notices a failure
            with suppress(Exception):
                finish()
        raise
