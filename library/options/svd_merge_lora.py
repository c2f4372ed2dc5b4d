"""Several LoRAs approximated by one."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option
from library.options.merge_lora import MergingOptions


@dataclass(frozen=True)
class SvdMergeLoraOptions(MergingOptions):
    """Which LoRAs are summed, how strongly, and what rank is left of the sum."""

    title: ClassVar[str] = "merging LoRAs by singular values"

    lbws: tuple[str, ...] | None = option(
        None, "for each LoRA a list of weights of its blocks, such as [1,0.5,...]", metavar="LIST"
    )
    new_rank: int = option(4, "rank of the new LoRA", metavar="RANK", minimum=1)
    new_conv_rank: int | None = option(
        None, "its rank for 3x3 convolutions; --new_rank when left out", metavar="RANK", minimum=1
    )
    device: str | None = option(None, "where it is decomposed: cpu (the default), cuda, cuda:1 ...", metavar="DEVICE")
