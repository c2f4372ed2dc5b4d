"""The blocks of a U-Net, in the order in which they are given learning rates of their own."""

from collections.abc import Iterable

from library.models.sgm_keys import UNET_PREFIX

_PARTS = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
_EMBEDDINGS = ("time_embed", "label_emb")
_NUMBERED = ("input_blocks", "middle_block", "output_blocks")


def unet_blocks(keys: Iterable[str]) -> dict[str, int]:
    """The block of each of a U-Net's tensors, by its full name in an original file; other names are left out.

    0 is what embeds the time and, in SDXL, pooled text and sizes; then come the input blocks, the middle ones and the
    output blocks, as they run, and the last layers. SDXL has 23: 0, 1-9, 10-12, 13-21, 22.
    """
    places = {}
    for key in keys:
        part, _, rest = key.removeprefix(UNET_PREFIX).partition(".")
        if key.startswith(UNET_PREFIX) and part in _PARTS:
            number = int(rest.partition(".")[0]) if part in _NUMBERED else 0
            places[key] = (0 if part in _EMBEDDINGS else _PARTS.index(part), number)
    order = {place: block for block, place in enumerate(sorted(set(places.values())))}
    return {key: order[place] for key, place in places.items()}
