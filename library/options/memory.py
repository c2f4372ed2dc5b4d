"""What is kept in memory, and where."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option


@dataclass(frozen=True)
class MemoryOptions:
    """What saves memory at the cost of time, or the other way round."""

    title: ClassVar[str] = "memory"

    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them: slower, much less memory"
    )
    cpu_offload_checkpointing: bool = option(
        False, "with --gradient_checkpointing, wait for the backward pass in main memory: slower, less device memory"
    )
    lowram: bool = option(
        False, "for little main memory: the model goes straight to the device, and all of it stays there"
    )
    highvram: bool = option(
        False, "for much device memory: what is not needed for a while stays on the device, and need not be moved"
    )

    def __post_init__(self) -> None:
        if self.lowram and self.highvram:
            raise UserError(
                "--lowram and --highvram are for different machines, and both keep all of the model on the device: "
                "drop one of them"
            )

    @property
    def stays_on_device(self) -> bool:
        """Whether parts that are not needed for a while stay on the device."""
        return self.lowram or self.highvram
