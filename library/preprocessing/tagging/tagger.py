"""Taggers as ONNX models: pictures in, probabilities out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.console import notice
from library.errors import UserError
from library.preprocessing.onnx_session import open_session, reason

if TYPE_CHECKING:
    from onnxruntime import NodeArg

_NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_SIDE = 448  # of the pictures that all taggers of this kind were trained with
_ERROR = 1e-3  # by which probabilities may leave 0..1


class Tagger:
    """A model that gives each of its tags a probability, on the provider that it runs on.

    `side`: of the square pictures it takes, in pixels. `provider`: as onnxruntime calls it.
    """

    def __init__(self, path: Path, tags: int, provider: str | None = None):
        """Reads a model for so many tags; `provider` as --provider. UserError if it cannot be used here."""
        self.path = path
        self._session = open_session(path, provider)
        self.provider = self._session.get_providers()[0]
        taken, given = self._session.get_inputs(), self._session.get_outputs()
        if len(taken) != 1:
            raise UserError(f"{path}: this model takes {len(taken)} inputs, a tagger takes only pictures")
        self._input, self._output = taken[0], given[0]
        if self._input.type not in _NUMBERS:
            raise UserError(f"{path}: this model takes {self._input.type}, a tagger takes floating-point numbers")
        self.side = _side(path, self._input)
        self._batch = self._input.shape[0] if isinstance(self._input.shape[0], int) else None
        self._tags = tags
        if len(self._output.shape) == 2 and isinstance(self._output.shape[1], int):
            self._check_count(self._output.shape[1])

    def probabilities(self, pictures: np.ndarray) -> np.ndarray:
        """Those of each tag, float32 (B, T), in pictures (B, side, side, 3) of blue, green and red, float32 in 0..255.

        A model for batches of one size gets them in such. UserError if it fails or gives no probabilities.
        """
        size = self._batch or len(pictures)
        parts = [self._run(pictures[start : start + size], size) for start in range(0, len(pictures), size)]
        found = np.concatenate(parts).astype(np.float32)
        if not (found.min() >= -_ERROR and found.max() <= 1 + _ERROR):  # NaN is neither
            raise UserError(f"{self.path}: this model gives numbers beyond 0 to 1 where probabilities are expected")
        return found

    def _run(self, pictures: np.ndarray, size: int) -> np.ndarray:
        count = len(pictures)
        blank = np.zeros((size - count, *pictures.shape[1:]), pictures.dtype)
        batch = np.concatenate([pictures, blank]).astype(_NUMBERS[self._input.type], copy=False)
        try:
            (found,) = self._session.run([self._output.name], {self._input.name: batch})
        except Exception as error:  # onnxruntime's have no type in common
            remedy = ", a smaller --batch_size needs less memory" if size > 1 and self._batch is None else ""
            raise UserError(f"{self.path}: this model cannot be run: {reason(error)}{remedy}") from error
        if found.ndim != 2 or len(found) != size:
            raise UserError(
                f"{self.path}: this model gives {found.shape} for {size} pictures, a tagger (pictures, tags)"
            )
        self._check_count(found.shape[1])
        return found[:count]

    def _check_count(self, count: int) -> None:
        if count != self._tags:
            raise UserError(
                f"{self.path}: this model gives {count} probabilities, but the list beside it has {self._tags} tags: "
                "they are not of the same tagger"
            )


def _side(path: Path, node: "NodeArg") -> int:
    """The side of the pictures that an input takes: (B, side, side, 3). UserError for others."""
    shape: list[Any] = node.shape
    if len(shape) != 4 or shape[3] != 3:
        shown = f"({', '.join(str(length or '?') for length in shape)})"
        raise UserError(f"{path}: this model takes {shown}, a tagger takes (pictures, height, width, 3)")
    sides = {length for length in shape[1:3] if isinstance(length, int)}
    if len(sides) > 1:
        raise UserError(f"{path}: this model takes pictures of {shape[2]}x{shape[1]}, a tagger takes square ones")
    if not sides:
        notice(f"{path}: this model takes pictures of any size: they are given to it in {_SIDE}x{_SIDE}")
    return sides.pop() if sides else _SIDE
