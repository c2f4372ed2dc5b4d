"""Full fine-tuning: the weights of the model itself are trained, and a file of it is a whole model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.console import notice
from library.errors import UserError
from library.models.blocks import unet_blocks
from library.models.diffusers_writer import check_replaceable
from library.models.family import Family
from library.models.metadata import RunFacts, modelspec, training_metadata
from library.models.registry import ModelInfo
from library.models.sgm_keys import usual_keys
from library.models.writing import FOLDERS, format_of, place_of, write_model
from library.options.full_model import FullModelOptions
from library.options.optimizer import OptimizerOptions
from library.training.methods.base import Method, ParameterGroup


class FineTune(Method):
    """Trains the U-Net and, if asked to, the text encoders. All else stays as it was read and is saved along, as do
    parts and blocks whose learning rate is 0.
    """

    def __init__(self, options: FullModelOptions, optimizer: OptimizerOptions):
        self.options = options
        self.log_name = options.log_name
        self.asked = options.rates(optimizer.learning_rate)
        self.rates = {part: rate for part, rate in self.asked.items() if rate}
        if not self.rates:
            raise UserError("nothing is left to train: every learning rate of the model is 0")
        for part in self.asked:
            if part not in self.rates:
                notice(f"{part} is not trained: its learning rate is 0")
        self.text_steps: int | None = None
        """In how many of the run's first steps a text encoder is trained; None: in all."""
        self.kind: str
        self.model: Family
        self.trained: nn.ModuleDict

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: Mapping[str, Any] | None) -> None:
        self._check_blocks(info)
        self.kind = self.options.format(format_of(info.path))
        target, sources = self.target(stem), [path for path in (info.path, info.vae_path) if path]
        if self.kind in FOLDERS:
            check_replaceable(target, keep=sources)
        elif target.is_dir():
            raise UserError(f"{target} is a folder: choose another --output_name")
        elif any(target.exists() and target.samefile(source) for source in sources):
            raise UserError(f"{target} is read for this training and would be replaced: choose another --output_name")

    def settle_length(self, steps: int) -> bool:
        wanted = self.options.text_encoder_steps
        if wanted is None:
            return False
        if wanted >= steps:
            notice(f"--stop_text_encoder_training {wanted} has no effect: the run ends at step {steps}")
            return False
        if "unet" not in self.rates:
            raise UserError(
                f"nothing is left to train after step {wanted}, because the U-Net has a learning rate of 0: drop "
                "--stop_text_encoder_training, or give a larger --learning_rate"
            )
        self.text_steps = wanted
        return True

    def _check_blocks(self, info: ModelInfo) -> None:
        """UserError for rates of more or fewer blocks than the U-Net has."""
        rates = self.options.block_rates
        if rates is None:
            return
        with info.open() as file:
            count = 1 + max(unet_blocks(usual_keys(file)).values())
        if len(rates) != count:
            raise UserError(
                f"--block_lr: {len(rates)} learning rates for the {count} blocks of {info.name}: give {count}, for the "
                "embeddings, the input, middle and output blocks, and the last layers"
            )

    def target(self, stem: Path) -> Path:
        return place_of(stem, self.kind)

    def saved(self, model: Family, trained: nn.Module) -> nn.Module:
        return model

    def is_trained(self, component: str) -> bool:
        # also at a rate of 0: what is asked for is saved as exactly as it was read
        first = component == "text_encoder" and "text_encoder_1" in self.asked
        return component in self.asked or first

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
        groups = []
        for part, rate in self.rates.items():
            steps = None if part == "unet" else self.text_steps
            if part == "unet" and self.options.block_rates is not None:
                groups += self._blocks(self.options.block_rates)
            else:
                groups.append(ParameterGroup(part, list(self.trained[part].parameters()), rate, steps))
        return groups

    def _blocks(self, rates: tuple[float, ...]) -> list[ParameterGroup]:
        """A group for each block of the U-Net that is trained."""
        names = self.model.components()["unet"].names
        named = {names.original(name): parameter for name, parameter in self.model.unet.named_parameters()}
        block_of = unet_blocks(named)
        groups = []
        for block, rate in enumerate(rates):
            if rate:
                parameters = [parameter for key, parameter in named.items() if block_of[key] == block]
                groups.append(ParameterGroup(f"unet_block_{block:02d}", parameters, rate))
        return groups

    def trains_text_encoder(self) -> bool:
        return any(part.startswith("text_encoder") for part in self.rates)

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        training = {} if settings.get("no_metadata") else training_metadata(settings, facts)
        return training | modelspec(settings, facts)

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        return write_model(self.model, stem, self.kind, dtype, metadata)
