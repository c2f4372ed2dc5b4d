"""How strongly a LoRA counts in each block of a model, as --lbws says it. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError

_SHOWN = 60  # characters of a list that a sentence quotes

# By the length of a list: the blocks of the U-Net that its values after the first one are for, as `unet_block` counts
# them. The shorter lists leave out blocks without attention.
_MIDDLE_OF_SDXL = (10, 11, 12)
_BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    17: tuple((block,) for block in (1, 2, 4, 5, 7, 8, 12, *range(16, 25))),
    26: tuple((block,) for block in range(25)),
    12: ((5,), (6,), (8,), (9,), _MIDDLE_OF_SDXL, *((block,) for block in range(13, 19))),
    20: (*((block,) for block in range(1, 10)), _MIDDLE_OF_SDXL, *((block,) for block in range(13, 22))),
}
_OF_SDXL = (12, 20)


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a list, `values`, whose length says which blocks they are for."""

    values: tuple[float, ...]

    @property
    def sdxl(self) -> bool:
        """Whether they are for SDXL."""
        return len(self.values) in _OF_SDXL

    def of(self, lora_name: str) -> float:
        """The weight of a layer; 1 in a block that the list leaves out, and in what is no block, such as the last
        layer and what embeds the time.
        """
        from networks.lora import unet_block  # lists are read before torch is imported

        if lora_name.startswith("lora_te"):
            return self.values[0]
        block = 0 if lora_name == "lora_unet_conv_in" else unet_block(lora_name)
        places = (place for place, blocks in enumerate(_BLOCKS[len(self.values)], 1) if block in blocks)
        return next((self.values[place] for place in places), 1.0)


def read(text: str, sdxl: bool | None = None) -> BlockWeights:
    """The weights that one value of --lbws gives; `sdxl` says which kind is wanted, if that is known. UserError if they
    cannot be understood, or are too many or too few.
    """
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"--lbws: {shown} is no JSON list, write numbers as in [1,0.5,...]") from error
    if not isinstance(values, list) or not all(_is_weight(value) for value in values):
        raise UserError(f"--lbws: {shown} is no JSON list of numbers, write them as in [1,0.5,...]")
    if len(values) not in _BLOCKS or sdxl not in (None, len(values) in _OF_SDXL):
        raise UserError(f"--lbws: {len(values)} weights in {shown}, give {counts_of_lists(sdxl)}")
    return BlockWeights(tuple(map(float, values)))


def counts_of_lists(sdxl: bool | None) -> str:
    """How many weights a list may have, as in a sentence; for SDXL, for other models, or for any if that is None."""
    told = {False: "17 or 26 for Stable Diffusion 1.x and 2.x", True: "12 or 20 for SDXL"}
    return ", ".join(told.values()) if sdxl is None else told[sdxl]


def read_all(texts: Sequence[str] | None, models: int, sdxl: bool | None = None) -> tuple[BlockWeights | None, ...]:
    """Those of each of so many LoRAs; None for all without --lbws. UserError as from `read`, or if the numbers of lists
    and LoRAs differ.
    """
    if not texts:
        return (None,) * models
    if len(texts) != models:
        raise UserError(f"--lbws: {len(texts)} lists for {models} LoRAs, give one for each, in their order")
    return tuple(read(text, sdxl) for text in texts)


def _is_weight(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
