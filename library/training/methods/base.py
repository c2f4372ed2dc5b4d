"""What a training method must answer."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.models.family import Family
from library.models.metadata import RunFacts
from library.models.registry import ModelInfo
from library.models.text import Tokenizer

if TYPE_CHECKING:
    from library.training.preservation import Preservation


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate. `name` is their name in the logs."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    steps: int | None = None
    """They are trained in so many of the run's first steps; None: in all."""
    by_chance: bool = False
    """Whether chance may leave them without gradients in some steps."""

    def trained_in(self, step: int) -> bool:
        """Whether they are in this step, counted from 0."""
        return self.steps is None or step < self.steps


class Method(ABC):
    """What is trained, and what a finished file of it holds. Hooks do nothing unless a method needs them."""

    log_name: str  # default name of the run in the log

    @abstractmethod
    def build(self, model: Family) -> nn.Module:
        """Freeze what is not trained and return the module that holds what is. Called once for the model of the run,
        before everything below that needs weights.
        """

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """The trained parameters, each in one group."""

    @abstractmethod
    def target(self, stem: Path) -> Path:
        """The file or folder that `save` writes: `stem` with the ending of its format."""

    @abstractmethod
    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        """Write the trained part as users load it, and return its `target`. That appears only when it is whole."""

    @abstractmethod
    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        """What a file of it tells about itself; `settings` are the flags' effective values by name."""

    def settle_length(self, steps: int) -> bool:
        """Called with how many steps the run has, before anything is loaded. Returns whether a part stops being trained
        before the last one.
        """
        return False

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: Mapping[str, Any] | None) -> None:  # noqa: B027
        """Called first of all, with the model to start from and the final `stem`, before anything is loaded; `resumed`:
        the facts of the state as which what is trained goes on. UserError if `save` could not write there.
        """

    def settled(self) -> dict[str, Any]:
        """Values in place of those of flags, by the flags' names, for which a resumed run gets them in the facts."""
        return {}

    def check_captions(self, table: RecordTable, datasets: Sequence[DatasetConfig]) -> None:  # noqa: B027
        """Called with what is trained on, before anything is loaded. UserError if it cannot be learned from."""

    def templates(self) -> tuple[str, ...]:
        """What is trained instead of the captions, one of these drawn for each use; nothing where captions count."""
        return ()

    def add_words(self, tokenizer: Tokenizer) -> None:  # noqa: B027
        """Have a tokenizer read captions as the model does once it is built."""

    def saved(self, model: Family, trained: nn.Module) -> nn.Module:
        """What the tensors that `save` writes belong to: the model, or what `build` made."""
        return trained

    def is_trained(self, component: str) -> bool:
        """Whether weights of the model itself in this one of `Family.components` are trained: those are read in
        float32, whatever the others are, unless trained weights are kept in half precision.
        """
        return False

    def trains_text_encoder(self) -> bool:
        """Whether gradients pass through a text encoder."""
        return True

    def enable_gradient_checkpointing(self) -> None:  # noqa: B027
        """Called where --gradient_checkpointing is set, after the model's own is on."""

    def on_micro_step(self, batch: Batch) -> None:  # noqa: B027
        """Called before every micro-batch."""

    def reads_gradients(self) -> bool:
        """Whether `before_step` looks at gradients."""
        return False

    def before_step(self) -> None:  # noqa: B027
        """Called before every optimizer step. Its gradients are there, multiplied with the scale of the losses in fp16;
        where weights move within the backward pass, most of them are gone.
        """

    def after_step(self, step: int) -> None:  # noqa: B027
        """Called after every optimizer step; `step` are done by then."""

    def preservation(self) -> "Preservation | None":
        """What asks the model how it answers without what is trained; None where that is the model itself."""
        return None

    def measured(self) -> Mapping[str, Tensor | float]:
        """What is logged of the step just done besides, by name; tensors of one value stay where they are."""
        return {}

    def rehearsed(self) -> None:  # noqa: B027
        """Called when the hooks above were called for a rehearsal: what comes next is the first micro-batch again."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know besides the trained weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` gave."""

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        """While it lasts, the trained tensors are those to show and save; then the trained ones again, bit for bit."""
        yield
