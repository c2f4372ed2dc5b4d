"""A training method for the miniature: the U-Net and the text encoder from nothing, published as a moving average."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.models.family import Family
from library.models.metadata import RunFacts, modelspec, training_metadata
from library.models.writing import place_of, write_model
from library.training.ema import Ema
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
        self.ema = Ema(self.trained.requires_grad_(True), self.decay)
        return self.trained

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(name, list(part.parameters()), self.learning_rate) for name, part in self.trained.items()
        ]

    def after_step(self, step: int) -> None:
        self.ema.update()

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state)

    def published_weights(self) -> AbstractContextManager[None]:
        return self.ema.swapped()

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        return training_metadata(settings, facts) | modelspec(settings, facts)

    def target(self, stem: Path) -> Path:
        return place_of(stem, "safetensors")

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        return write_model(self.model, stem, "safetensors", dtype, metadata)
