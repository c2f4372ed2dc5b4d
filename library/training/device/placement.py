"""What is on the device in which phase."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from library.models.family import Family
from library.options.cache import CacheOptions
from library.options.memory import MemoryOptions


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Bring all parts of a module to the device, and each back to where it was afterwards."""
    parts = [(part, next(part.parameters()).device) for part in module.children()]
    module.to(device)
    try:
        yield
    finally:
        for part, home in parts:
            part.to(home)


@dataclass(frozen=True)
class Placement:
    """Where the encoders are while nothing is encoded."""

    vae_rests: bool
    """Whether it waits in main memory, as latents are cached."""
    text_encoders_rest: bool

    def rest(self, model: Family) -> None:
        """Have all that no step needs leave the device; previews bring it back."""
        if self.vae_rests:
            leave(model.vae)
        if self.text_encoders_rest:
            leave(model.text_encoders)


def place(memory: MemoryOptions, caching: CacheOptions, *, latents: bool) -> Placement:
    """`latents`: whether those of the run are cached, for which there may be other reasons than a flag."""
    moves = not memory.stays_on_device
    return Placement(vae_rests=moves and latents, text_encoders_rest=moves and caching.text)


def leave(module: nn.Module) -> None:
    """Move a module to main memory, and give back what the device has kept free for it."""
    module.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
