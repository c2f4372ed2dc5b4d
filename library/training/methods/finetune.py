"""Full fine-tuning: the weights of the model itself are trained, and a file of it is a whole model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.models.diffusers_writer import check_replaceable
from library.models.family import Family
from library.models.metadata import RunFacts, modelspec, training_metadata
from library.models.registry import ModelInfo
from library.models.writing import FOLDERS, format_of, place_of, write_model
from library.options.full_model import FullModelOptions
from library.options.optimizer import OptimizerOptions
from library.training.methods.base import Method, ParameterGroup


class FineTune(Method):
    """Trains the U-Net and, if asked to, the text encoders. All else stays as it was read and is saved along."""

    def __init__(self, options: FullModelOptions, optimizer: OptimizerOptions):
        self.options = options
        self.log_name = options.log_name
        self.rates = options.rates(optimizer.learning_rate)
        if not any(self.rates.values()):
            raise UserError("nothing is left to train: every learning rate of the model is 0")
        self.kind: str
        self.model: Family
        self.trained: nn.ModuleDict

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: bool) -> None:
        self.kind = self.options.format(format_of(info.path))
        target, sources = self.target(stem), [path for path in (info.path, info.vae_path) if path]
        if self.kind in FOLDERS:
            check_replaceable(target, keep=sources)
        elif target.is_dir():
            raise UserError(f"{target} is a folder: choose another --output_name")
        elif any(target.exists() and target.samefile(source) for source in sources):
            raise UserError(f"{target} is read for this training and would be replaced: choose another --output_name")

    def target(self, stem: Path) -> Path:
        return place_of(stem, self.kind)

    def saved(self, model: Family, trained: nn.Module) -> nn.Module:
        return model

    def is_trained(self, component: str) -> bool:
        kind = "text_encoder" if component.startswith("text_encoder") else component
        return any(part.startswith(kind) for part in self.rates)

    def build(self, model: Family) -> nn.Module:
        self.model = model
        one, *others = encoders = model.text_encoders
        named = {f"text_encoder_{number}": encoder for number, encoder in enumerate(encoders, 1)}
        parts = {"unet": model.unet, **(named if others else {"text_encoder": one})}
        self.trained = nn.ModuleDict({name: parts[name] for name in self.rates})
        model.requires_grad_(False)
        self.trained.requires_grad_(True)
        return self.trained

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(name, list(self.trained[name].parameters()), rate) for name, rate in self.rates.items()]

    def trains_text_encoder(self) -> bool:
        return self.options.trains_text_encoder

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        training = {} if settings.get("no_metadata") else training_metadata(settings, facts)
        return training | modelspec(settings, facts)

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        return write_model(self.model, stem, self.kind, dtype, metadata)
