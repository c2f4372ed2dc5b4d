"""What becomes of pictures that the processor of a captioning model does not take."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.data.decode import BrokenImage
from library.preprocessing.captioning.captioner import Reader


class Processor:
    """Stands for one that scales the shorter side to 224 pixels, and fails as it is told."""

    tokenizer = SimpleNamespace()

    def __init__(self, error: Exception | None = None):
        self.error = error

    def __call__(self, images: list, text: None, return_tensors: str) -> dict[str, torch.Tensor]:
        if self.error is not None:
            raise self.error
        width, height = images[0][0].size
        scale = 224 / min(width, height)
        assert width * height * scale**2 < 10e6
        return {"pixel_values": torch.zeros(1, 3, round(height * scale), round(width * scale))}


def pixels(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(3, 60000), (60000, 3), (1, 101)])
def test_strips_need_no_huge_memory(size):
    with pytest.raises(BrokenImage, match=rf"it is too narrow for the model \({size[0]}x{size[1]}\)"):
        Reader(Processor(), None, set(), False)(pixels(*size))


def test_narrow_pictures_are_read():
    assert Reader(Processor(), None, set(), False)(pixels(20, 2000))["pixel_values"].shape == (1, 3, 22400, 224)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, IndexError, ZeroDivisionError])
def test_a_processor_that_fails_fails_for_one_picture(error):
    with pytest.raises(BrokenImage, match=r"the model does not take it \(no\)"):
        Reader(Processor(error("no\nmore")), None, set(), False)(pixels(60, 40))


def test_too_small_a_memory_is_no_fault_of_the_picture():
    with pytest.raises(MemoryError):
        Reader(Processor(MemoryError()), None, set(), False)(pixels(60, 40))
