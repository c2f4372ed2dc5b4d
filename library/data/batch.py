"""One micro-batch: what loader processes make and the training step reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from library.data.plan import BatchPlan
from library.transfer import to_device


@dataclass
class Batch:
    """One micro-batch of B examples."""

    plan: BatchPlan
    seeds: list[int]
    """Per example: the start of its random choices."""
    records: list[int]
    """Per example: its index in the table."""
    captions: list[str]
    images: torch.Tensor | None
    """(B, 3, H, W) float32 in -1..1, or None if there are latents"""
    latents: torch.Tensor | None
    """(B, C, h, w) float32, unscaled, or None"""
    text: dict[str, torch.Tensor] | None
    """What the text encoders say of the captions, by kind and batch first, or None if they are to be asked"""
    sizes: torch.Tensor
    """(B, 6) float32: original height and width, crop top and left, target height and width"""
    loss_mask: torch.Tensor | None
    """(B, 1, h, w) float32 factors of the loss, or None"""
    weights: torch.Tensor
    """(B,) float32 factors of the loss; 0 for what must not train"""
    network_multiplier: float = 1.0
    """How strongly a network acts on the model for this batch."""
    custom_attributes: list[Mapping[str, Any]] = field(default_factory=list)
    """Per example: what its subset says of itself."""
    failures: dict[int, str] = field(default_factory=dict)
    """What is wrong with records that could not be used, by their index in the table."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory. The DataLoader looks for a method of this name."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        if self.text is not None:
            changed["text"] = {kind: change(value) for kind, value in self.text.items()}
        return replace(self, **changed)
