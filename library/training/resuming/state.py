"""Where a run stands, and everything that it needs to go on from there."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from library.data.plan import BatchPlan
from library.errors import UserError
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.metadata import IMPLEMENTATION_VERSION
from library.replacing import replacing, replacing_folder, working_names
from library.training import together
from library.training.device import engines
from library.training.resuming import states
from library.training.resuming.packing import pack, put, raw, unpack
from library.training.resuming.states import StateFolder
from library.training.step import TrainingStep

_OURS = {"modelspec.implementation_version": IMPLEMENTATION_VERSION}  # whoever reads the files may trust their hashes


@dataclass
class Progress:
    """How far a run has come. Everything that names or numbers what a run writes reads it here."""

    total_steps: int
    total_epochs: int
    step: int = 0  # optimizer steps done
    epoch: int = 1  # the epoch of the last step, counted from 1
    epoch_ended: bool = False  # the last step was its epoch's last
    images: int = 0  # images trained on, over all processes
    stopped_by: int | None = None  # the --stop_after_no_improvement that has ended the run

    def advance(self, plan: BatchPlan) -> None:
        """Count the optimizer step that ended with this micro-batch."""
        self.step = plan.step + 1
        self.epoch = plan.epoch
        self.epoch_ended = plan.last_of_epoch
        self.images += plan.images_in_step

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


class Stateful(Protocol):
    """Something that has to survive the process. Its state is made of numbers, texts, tensors, and what holds those."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class TrainState:
    """A run's named objects, what it trains and how far it is: as a folder, and back.

    Engines that spread the trained weights over the processes keep these and the optimizer's state themselves, in a
    folder within it.
    """

    def __init__(self, progress: Progress, step: TrainingStep, facts: Mapping[str, Any], accelerator: Accelerator):
        """`facts`: what the run is made of, in values that JSON knows; see `resume`."""
        self.progress = progress
        self.step = step
        self.facts = facts
        self.accelerator = accelerator
        self.is_spread = engines.spreads(accelerator)
        self.objects: Mapping[str, Stateful] = {}

    def save(self, folder: Path) -> None:
        """Write the folder, which appears when it is whole. UserError if the disk does not take it.

        Called by the first process, or by all of them where the weights are spread.
        """
        temporary, _ = working_names(folder)
        is_first = together.is_first()
        with replacing_folder(folder) if is_first else nullcontext():
            if self.is_spread:
                together.wait()
                engines.save_engine(self.accelerator, temporary / states.ENGINE)
                together.wait()
            if is_first:
                self._write(temporary)

    def _write(self, folder: Path) -> None:
        if not self.is_spread:
            write_tensors(folder / states.TRAINED, raw(self.step.trained), None, _OURS, content_hash=True)
        tensors: dict[str, Tensor] = {}
        packed = {name: pack(thing.state_dict(), tensors, name) for name, thing in self.objects.items()}
        write_tensors(folder / states.TENSORS, tensors, None, _OURS, content_hash=True)
        with replacing(folder / states.OBJECTS) as file:
            file.write(json.dumps(states.sealed({"objects": packed})).encode())
        states.write_manifest(folder, dataclasses.asdict(self.progress), self.facts)


def load_trained(folder: Path, trained: nn.Module) -> None:
    """Give what is trained the values that a state has. ValueError that says what does not fit; UserError if the file
    is damaged.
    """
    with open_weights(folder / states.TRAINED) as file:
        file.verify()
        put(trained, file.tensors())


def read_objects(state: StateFolder) -> dict[str, Any]:
    """The states of a folder's objects, by name. UserError if a file is damaged."""
    with open_weights(state.folder / states.TENSORS) as file:
        file.verify()
        tensors = file.tensors()
    try:
        packed = states.unsealed(json.loads((state.folder / states.OBJECTS).read_bytes()))["objects"]
        return {name: unpack(value, tensors) for name, value in packed.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state.folder / states.OBJECTS} is damaged: resume from another state") from error
