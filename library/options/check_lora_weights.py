"""Looking into networks' files."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


@dataclass(frozen=True)
class CheckLoraWeightsOptions:
    """Which file is looked into, and how closely."""

    title: ClassVar[str] = "looking into networks"

    file: str | None = option(None, "the network, .safetensors or .ckpt", positional=True)
    show_all_keys: bool = option(
        False, "list alphas, magnitudes, biases and norms, too, not only the matrices", short="s"
    )
