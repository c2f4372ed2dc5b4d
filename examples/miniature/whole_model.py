"""A training method for the miniature: the U-Net and the text encoder from nothing, published as a moving average."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.models.family import Family
from library.models.metadata import RunFacts, modelspec, training_metadata
from library.models.writing import write_model
from library.training.methods.base import Method, ParameterGroup


class WholeModel(Method):
    """Trains everything but the autoencoder. What is shown and saved is a moving average of the weights."""

    log_name = "miniature"

    def __init__(self, learning_rate: float, decay: float = 0.999):
        self.learning_rate = learning_rate
        self.decay = decay

    def build(self, model: Family) -> nn.Module:
        self.model = model
        self.trained = nn.ModuleDict({"text_encoder": model.text_encoders, "unet": model.unet}).float()
        self.parameters = list(self.trained.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        return self.trained

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(name, list(part.parameters()), self.learning_rate) for name, part in self.trained.items()
        ]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        return training_metadata(settings, facts) | modelspec(settings, facts)

    def save(self, stem: Path, kind: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        return write_model(self.model, stem, kind, dtype, metadata)
