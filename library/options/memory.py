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
        False, "for little main memory: all of the model stays on the device, and nothing comes back to main memory"
    )
    highvram: bool = option(False, "for much device memory: the same as --lowram, so that nothing need be moved")
    fused_backward_pass: bool = option(
        False, "move each weight as soon as its gradient is there, and free that: memory for one gradient, not for all"
    )
    fused_optimizer_groups: int | None = option(
        None,
        "the same for sets of weights: divide them into this many, and move a set when all of its gradients are there",
        metavar="N",
        minimum=1,
    )

    def __post_init__(self) -> None:
        if self.fused_backward_pass and self.fused_optimizer_groups:
            raise UserError(
                "--fused_backward_pass, --fused_optimizer_groups: the first moves each weight by itself and the second "
                "sets of them, drop one of them"
            )

    @property
    def stays_on_device(self) -> bool:
        """Whether parts that are not needed for a while stay on the device."""
        return self.lowram or self.highvram

    @property
    def fused(self) -> str | None:
        """The flag by which weights move within the backward pass, if one is set."""
        if self.fused_backward_pass:
            return "--fused_backward_pass"
        return "--fused_optimizer_groups" if self.fused_optimizer_groups else None
