"""What is computed once, before training, and kept."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class CacheOptions:
    """Caching of latents and of text encoder outputs."""

    title: ClassVar[str] = "caching"

    cache_latents: bool = option(
        False, "encode every image once before training: faster, and the VAE leaves the device"
    )
    cache_latents_to_disk: bool = option(
        False, "the same, and keep the latents in files beside the images for other runs"
    )
    vae_batch_size: int = option(1, "images the VAE encodes at a time while caching", metavar="N", minimum=1)
    cache_text_encoder_outputs: bool = option(
        False, "encode every caption once before training; captions must not vary, text encoders are not trained"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "the same, and keep the outputs in files beside the images for other runs"
    )
    text_encoder_batch_size: int | None = option(
        None, "captions the text encoders encode at a time while caching, 1 when left out", metavar="N", minimum=1
    )
    skip_cache_check: bool = option(False, "trust the cache files that are there without looking into them")
    recache_unknown: bool = option(False, "make latents files anew that do not tell which VAE they are from")

    @property
    def latents(self) -> bool:
        """Whether latents are cached at all."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text(self) -> bool:
        """Whether text encoder outputs are cached at all."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
