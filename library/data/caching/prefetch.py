"""Images decoded in threads ahead of the encoder that wants them, group by group."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from library.ahead import ahead
from library.data import images
from library.data.caching.latents_file import Recipe, describe_source

THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Picture:
    """An image on its way to the encoder."""

    recipe: Recipe
    image: np.ndarray
    """(H, W, 3) uint8 of the bucket's size; black where there is a problem, so that its group keeps its shape"""
    mask: np.ndarray | None
    """(H, W) float32"""
    source: dict[str, Any]
    """What the image file was like."""
    problem: str = ""
    """Why it does not decode."""


def decoded(groups: Iterable[list[Recipe]], threads: int = THREADS) -> Iterator[list[Picture]]:
    """The pictures of one group after the other. While one is worked with, the next ones are decoded."""
    sizes: deque[int] = deque()

    def recipes() -> Iterator[Recipe]:
        for group in groups:
            sizes.append(len(group))
            yield from group

    pictures = ahead(_decode, recipes(), threads, waiting=2 * threads)
    for first in pictures:
        yield [first, *islice(pictures, sizes.popleft() - 1)]


def _decode(recipe: Recipe) -> Picture:
    record = recipe.record
    try:
        try:
            # before decoding: an image that changes meanwhile is found stale later
            source = describe_source(record.path)
        except FileNotFoundError:
            raise images.BrokenImage("it is no longer there") from None
        example = images.example(record.path, recipe.geometry, recipe.options, None)
    except (images.BrokenImage, OSError) as problem:
        width, height = record.bucket
        return Picture(recipe, np.zeros((height, width, 3), np.uint8), None, {}, str(problem))
    return Picture(recipe, example.image, example.mask, source)
