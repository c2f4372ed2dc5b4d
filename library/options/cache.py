"""What is computed once, before training, and kept."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class CacheOptions:
    """Caching of latents."""

    title: ClassVar[str] = "caching"

    cache_latents: bool = option(
        False, "encode every image once before training: faster, and the VAE leaves the device"
    )
    vae_batch_size: int = option(1, "images the VAE encodes at a time while caching", metavar="N", minimum=1)
