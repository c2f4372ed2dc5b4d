"""Detectors of faces: models in ONNX, run by onnxruntime.

YuNet (Wu, Peng, Yu, "YuNet: A Tiny Millisecond-level Face Detector", 2023), for photographs, tells of eyes and mouths
too; what its outputs mean is as OpenCV's FaceDetectorYN reads them. Models of the YOLO family with the outputs of
YOLOv8 find drawn faces as well, if they were trained on such; boxes are all they tell.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from library.data.augment import resize
from library.data.buckets import Size
from library.errors import UserError
from library.preprocessing.faces.crops import Detected, clipped
from library.preprocessing.onnx_session import open_session, reason

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_SIDE = 640  # pixels of the input, where the model leaves that open
_OVERLAP = 0.45  # share of two boxes' union from which they are one face
_NUMBERS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PARTS = ("cls", "obj", "bbox", "kps")  # what YuNet tells for each cell of grids with these
_STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Boxes:
    """Faces as a model tells of them, in pixels of its input."""

    scores: np.ndarray
    """(N,), 0 to 1"""
    centres: np.ndarray
    """(N, 2)"""
    sizes: np.ndarray
    """(N, 2)"""
    marks: np.ndarray
    """(N, 5, 2), or (N, 0, 2) from a model that knows none"""

    def __getitem__(self, which: np.ndarray) -> "Boxes":
        return Boxes(self.scores[which], self.centres[which], self.sizes[which], self.marks[which])

    @classmethod
    def together(cls, parts: list["Boxes"]) -> "Boxes":
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


class Detector(ABC):
    """A model with what goes in and out of it. Any thread may ask it; one at a time is answered."""

    has_marks: ClassVar[bool]
    """Whether it knows where eyes and mouth are."""
    usual_threshold: ClassVar[float]
    background: ClassVar[int]
    """What the input has where the picture leaves room, 0 to 255."""
    views: ClassVar[tuple[float, ...]] = (1.0,)
    """How large a picture is shown to it, as shares of its input."""

    def __init__(self, session: "InferenceSession", threshold: float | None):
        (entry,) = session.get_inputs()
        height, width = (side if isinstance(side, int) else _SIDE for side in entry.shape[2:])
        self.input: Size = (width, height)
        self.threshold = self.usual_threshold if threshold is None else threshold
        self._name, self._numbers = entry.name, _NUMBERS[entry.type]
        self._outputs = [output.name for output in session.get_outputs()]
        self._session, self._lock = session, threading.Lock()

    @property
    def where(self) -> str:
        """The provider of onnxruntime that really computes."""
        return self._session.get_providers()[0]

    def faces(self, pixels: np.ndarray) -> list[Detected]:
        """The faces in a picture (H, W, 3), the largest first."""
        size = pixels.shape[1], pixels.shape[0]
        seen = Boxes.together([self._look(pixels, view) for view in self.views])
        boxes = seen[different(seen)]
        found = [
            clipped(Detected(tuple(centre), tuple(extent), score, tuple(map(tuple, marks))), size)
            for score, centre, extent, marks in zip(
                boxes.scores.tolist(), boxes.centres.tolist(), boxes.sizes.tolist(), boxes.marks.tolist(), strict=True
            )
        ]
        visible = [face for face in found if min(face.size) >= 1]
        return sorted(visible, key=lambda face: (-face.size[0] * face.size[1], face.centre))

    def _look(self, pixels: np.ndarray, view: float) -> Boxes:
        """What is found in the picture shown at a share of the input's size, in pixels of the picture."""
        shown, scales = letterbox(pixels, self.input, view, self.background)
        entry = self.entry(shown)[None].astype(self._numbers)
        try:
            with self._lock:
                outputs = self._session.run(None, {self._name: entry})
        except Exception as error:  # onnxruntime's have no type in common
            raise UserError(f"--model: this model cannot be run: {reason(error)}") from error
        boxes = self.read(dict(zip(self._outputs, outputs, strict=True)))
        boxes = boxes[boxes.scores >= self.threshold]
        return Boxes(boxes.scores, boxes.centres / scales, boxes.sizes / scales, boxes.marks / scales)

    @abstractmethod
    def entry(self, shown: np.ndarray) -> np.ndarray:
        """The model's input (3, H, W) of a picture (H, W, 3)."""

    @abstractmethod
    def read(self, outputs: dict[str, np.ndarray]) -> Boxes:
        """All that the model tells, whatever its score."""


class YuNet(Detector):
    """Scores, boxes and marks for each cell of three grids."""

    has_marks = True
    usual_threshold = 0.9
    background = 0
    views = (1.0, 0.5)  # it knows no faces of more than about 300 pixels

    def entry(self, shown: np.ndarray) -> np.ndarray:
        return shown[..., ::-1].transpose(2, 0, 1)  # blue first

    def read(self, outputs: dict[str, np.ndarray]) -> Boxes:
        parts = []
        for stride in _STRIDES:
            face, thing, box, marks = (outputs[f"{part}_{stride}"].astype(float) for part in _PARTS)
            box, marks = box.reshape(-1, 4), marks.reshape(-1, 5, 2)
            rows, columns = np.divmod(np.arange(len(box)), self.input[0] // stride)
            cells = np.stack((columns, rows), axis=1)
            parts.append(
                Boxes(
                    np.sqrt(np.clip(face.ravel(), 0, 1) * np.clip(thing.ravel(), 0, 1)),
                    (cells + box[:, :2]) * stride,
                    np.exp(box[:, 2:].clip(max=20)) * stride,
                    (cells[:, None] + marks) * stride,
                )
            )
        return Boxes.together(parts)


class Yolo(Detector):
    """One list of centres, sizes and scores."""

    has_marks = False
    usual_threshold = 0.3
    background = 114

    def entry(self, shown: np.ndarray) -> np.ndarray:
        return shown.transpose(2, 0, 1) / 255

    def read(self, outputs: dict[str, np.ndarray]) -> Boxes:
        (rows,) = outputs.values()
        if rows.shape[:2] != (1, 5):
            raise UserError(f"--model: {_unknown(f'its output is {rows.shape}, not (1, 5, boxes)')}")
        x, y, width, height, scores = rows[0].astype(float)
        marks = np.empty((len(scores), 0, 2))
        return Boxes(scores, np.stack((x, y), axis=1), np.stack((width, height), axis=1), marks)


def open_detector(path: Path, threshold: float | None = None) -> Detector:
    """The detector in a file; faces below the threshold, by default its kind's own, are none. UserError if the file is
    no such model.
    """
    session = open_session(path)
    kind = _kind(session)
    if isinstance(kind, str):
        raise UserError(f"--model: {path}: {_unknown(kind)}")
    return kind(session, threshold)


def _unknown(reason: str) -> str:
    return f"this is neither YuNet nor a YOLO model for faces alone ({reason})"


def _kind(session: "InferenceSession") -> type[Detector] | str:
    """What the model is by its inputs and outputs, or why it is nothing known."""
    entries, outputs = session.get_inputs(), session.get_outputs()
    if len(entries) != 1 or entries[0].type not in _NUMBERS or not _fits(entries[0].shape, (1, 3, None, None)):
        shapes = ", ".join(f"{entry.shape} {entry.type}" for entry in entries)
        return f"it does not take one picture as numbers (1, 3, height, width) but {shapes}"
    if {f"{part}_{stride}" for part in _PARTS for stride in _STRIDES} <= {output.name for output in outputs}:
        return YuNet
    if len(outputs) == 1 and _fits(outputs[0].shape, (1, 5, None)):
        return Yolo
    return "its outputs are " + ", ".join(f"{output.name} {output.shape}" for output in outputs[:4])


def _fits(shape: list[Any], wanted: tuple[int | None, ...]) -> bool:
    """Whether a shape, in which text stands for any number, may be this one."""
    if len(shape) != len(wanted):
        return False
    return all(
        wants is None or not isinstance(number, int) or number == wants
        for number, wants in zip(shape, wanted, strict=True)
    )


def letterbox(pixels: np.ndarray, size: Size, view: float, background: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, as large as its aspect lets it fit into that share of `size`, in the upper left corner of an input
    of that size; and the scales (2,) from picture to input.
    """
    height, width = pixels.shape[:2]
    scale = view * min(size[0] / width, size[1] / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    shown = np.full((size[1], size[0], 3), background, dtype=np.uint8)
    shown[: inner[1], : inner[0]] = resize(pixels, inner)
    return shown, np.array(inner) / (width, height)


def different(boxes: Boxes, overlap: float = _OVERLAP) -> np.ndarray:
    """Which boxes are faces of their own, surest first: those that share less than `overlap` of their union with any
    surer one.
    """
    order = np.argsort(-boxes.scores, kind="stable")
    low, high = boxes.centres - boxes.sizes / 2, boxes.centres + boxes.sizes / 2
    areas = boxes.sizes.prod(axis=1)
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        sides = np.minimum(high[first], high[order]) - np.maximum(low[first], low[order])
        common = sides.clip(0).prod(axis=1)
        order = order[common <= overlap * (areas[first] + areas[order] - common)]
    return np.array(kept, dtype=int)
