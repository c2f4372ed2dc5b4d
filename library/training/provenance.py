"""Where a trained file comes from: the facts of a run that its metadata tells."""

import random
import time
from typing import Any

import torch

from library.data.buckets import Size
from library.data.records import RecordTable
from library.data.report.metadata_facts import dataset_metadata
from library.models.family import Family
from library.models.metadata import BaseModel, RunFacts
from library.models.registry import public_name
from library.options.metadata import MetadataOptions
from library.options.optimizer import OptimizerOptions
from library.options.scheduler import SchedulerOptions
from library.training.methods.base import Method
from library.training.optimization.optimizers import described
from library.training.optimization.schedulers import settle
from library.training.outlook import Outlook
from library.training.resuming.state import Progress


def most_common_size(table: RecordTable) -> Size:
    """The bucket that most images have."""
    _, bucket, _ = max(table.by_bucket(), key=lambda found: len(found[2]))
    return bucket


class Provenance:
    """Called with the progress of a save, it gives the metadata of the file."""

    def __init__(self, run: Outlook, method: Method, model: Family, optimizer: torch.optim.Optimizer):
        self.method = method
        rates = settle(run.settings[SchedulerOptions], optimizer)
        self.settings = run.settings.flat() | {
            **run.settings[MetadataOptions].described(),
            "seed": run.seed,
            "mixed_precision": run.formats.mixed,
            "full_fp16": run.formats.trained == torch.float16,
            "lr_scheduler": rates.name,
            "lr_warmup_steps": rates.warmup_heard,
        }
        if method.is_trained("unet"):
            self.settings |= {"fp8_base": False, "fp8_base_unet": False}  # which have no effect then
        self.info = run.info
        self.model = model
        self.datasets = run.plans.datasets
        self.dataset_fields = dataset_metadata(run.table, self.datasets, run.plan)
        self.world = run.plan.world
        # sizes that come from metadata files: the one that most images have
        self.resolution = self.datasets[0].resolution or most_common_size(run.table)
        self.optimizer = described(run.settings[OptimizerOptions], optimizer)
        self.session_id = random.SystemRandom().randrange(2**32)
        self.started_at = time.time()

    def state_dict(self) -> dict[str, Any]:
        return {"session_id": self.session_id, "started_at": self.started_at, "optimizer": self.optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that goes on is still the same, and its optimizer, if it is of the same class, keeps its arguments."""
        self.session_id, self.started_at = state["session_id"], state["started_at"]
        before = state.get("optimizer", "")
        if before.partition("(")[0] == self.optimizer.partition("(")[0]:
            self.optimizer = before

    def __call__(self, progress: Progress) -> dict[str, str]:
        batch_sizes = [dataset.batch_size for dataset in self.datasets]
        base = BaseModel(
            name=public_name(self.info.name),
            version=self.info.family.base_model_version,
            architecture=self.model.architecture,
            prediction=self.model.prediction,
            hashes=self.info.hashes,
            vae=self.info.vae and public_name(self.info.vae),
            vae_hashes=self.info.vae_hashes,
        )
        facts = RunFacts(
            base=base,
            datasets=self.dataset_fields,
            resolution=self.resolution,
            optimizer=self.optimizer,
            session_id=self.session_id,
            started_at=self.started_at,
            finished_at=time.time(),
            steps=progress.step,
            max_train_steps=progress.total_steps,
            epoch=progress.epoch,
            num_epochs=progress.total_epochs,
            total_batch_size=max(batch_sizes) * self.world * self.settings["gradient_accumulation_steps"],
        )
        return self.method.metadata(self.settings, facts)
