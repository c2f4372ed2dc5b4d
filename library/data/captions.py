"""The caption pipeline: what is on disk -> what the model reads. A pure function of the caption and a generator."""

import numpy as np


def compose(caption: str, *, separator: str, keep_tokens: int, shuffle: bool, rng: np.random.Generator) -> str:
    """One drawing of a caption.

    The first line is used. With `shuffle` it is split at `separator`, the first `keep_tokens` parts stay, the others
    change places, and all are joined with ", ". A caption that need not be split stays as it is written.
    """
    line = caption.partition("\n")[0]
    if not shuffle:
        return line
    tags = [tag.strip() for tag in line.split(separator)]
    kept, loose = tags[:keep_tokens], tags[keep_tokens:]
    return ", ".join(kept + _shuffled(loose, rng))


def _shuffled(tags: list[str], rng: np.random.Generator) -> list[str]:
    return [tags[index] for index in rng.permutation(len(tags))]
