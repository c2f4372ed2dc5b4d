"""Prior preservation without pictures: samples whose target is what the model itself predicts.

A subset asks for it with `custom_attributes = { diff_output_preservation = true }`. Of each of its samples the model
without what is trained beside it gets the same noisy latents, timestep and caption, and what it answers takes the place
of the noise (or v) as the target.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor

from library.data.batch import Batch
from library.data.config import DatasetConfig, preserved_subset
from library.data.config_values import PRESERVES
from library.errors import UserError
from library.models.family import Family
from library.training.device import engines
from library.transfer import to_device


def preserved(batch: Batch) -> list[int]:
    """Which examples of a batch are to keep what the model says of them."""
    return [index for index, own in enumerate(batch.custom_attributes) if own.get(PRESERVES)]


def check_engine(datasets: Sequence[DatasetConfig], accelerator: Accelerator) -> None:
    """UserError where the processes could not go on together: FSDP lets all of them compute alike, or none."""
    marked = preserved_subset(datasets)
    if marked and engines.engine(accelerator) == "fsdp":
        raise UserError(
            f"{marked.where('custom_attributes')}: {PRESERVES} does not work under FSDP, whose processes have to "
            "compute the same number of predictions: train without FSDP, or leave it out"
        )


class Preservation:
    """Asks a model what it says without what is trained beside it."""

    def __init__(self, without_trained: Callable[[], AbstractContextManager[None]], *, trains_text_encoder: bool):
        """While `without_trained` lasts, the model answers as if nothing was trained beside it, and draws nothing at
        random.
        """
        self.without_trained = without_trained
        self.trains_text_encoder = trains_text_encoder

    @torch.no_grad()
    def targets(
        self, model: Family, batch: Batch, rows: Sequence[int], noisy: Tensor, timesteps: Tensor, targets: Tensor
    ) -> Tensor:
        """The targets (B, C, h, w), those of `rows` replaced by the model's own predictions for the noisy latents
        (B, C, h, w) at timesteps (B,).
        """
        index = to_device(torch.tensor(rows), noisy.device)
        with self.without_trained():
            if batch.text is None or self.trains_text_encoder:
                text = model.encode_text([batch.captions[row] for row in rows])
            else:
                text = {kind: values.index_select(0, index) for kind, values in batch.text.items()}
            condition = model.condition(text, batch.sizes.index_select(0, index))
            own = model.denoise(noisy.index_select(0, index), timesteps.index_select(0, index), condition)
        return targets.index_copy(0, index, own.to(targets.dtype))
