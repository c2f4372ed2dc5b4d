"""Detectors of faces with known answers: ONNX graphs that look for areas of pure colour, exactly to the pixel.

A face is red, or magenta; a red one may have a green right and a blue left eye and a yellow mouth inside. They have the
inputs and outputs of YuNet and of YOLOv8.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 640
# which of red, green and blue are there
RED, MAGENTA, GREEN, BLUE, YELLOW = (1, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 0)


class Graph:
    """Nodes and constants, added one by one; every method returns the name of what it has made."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        name = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def largest(self, values: str, *kernel: int) -> str:
        return self.node("MaxPool", values, kernel_shape=kernel)

    def mask(self, picture: str, colour: tuple[int, int, int], full: float, order: tuple[int, int, int]) -> str:
        """(1, 1, H, W) 1 where the picture has the colour, else 0: three channels that are all as they should be."""
        weights, bias = np.zeros((1, 3, 1, 1)), 0.0
        for channel, there in zip(order, colour, strict=True):
            weights[0, channel] = (1 if there else -1) / full
            bias -= 1 if there else 0
        closeness = self.node("Conv", picture, self.constant(weights), self.constant([bias + 1]))  # 1 if it is pure
        sharp = self.node("Mul", self.node("Sub", closeness, self.constant(0.5)), self.constant(1000.0))
        return self.node("Clip", sharp, self.constant(0.0), self.constant(1.0))

    def box(self, mask: str) -> list[str]:
        """left, top, right, bottom and whether there is anything, each (1, 1, 1)."""
        along = np.arange(SIDE, dtype=np.float32)
        one = self.constant([1, 1, 1], np.int64)
        starts, ends = [], []
        for across in ([SIDE, 1], [1, SIDE]):
            line, rest = self.largest(mask, *across), across[::-1]
            shape = (1, 1, *rest)
            to_start, to_end = (self.constant(far.reshape(shape)) for far in (SIDE - along, along + 1))
            start = self.largest(self.node("Mul", line, to_start), *rest)
            starts.append(self.node("Sub", self.constant(float(SIDE)), self.node("Reshape", start, one)))
            ends.append(self.node("Reshape", self.largest(self.node("Mul", line, to_end), *rest), one))
        return [*starts, *ends, self.node("Reshape", self.largest(mask, SIDE, SIDE), one)]

    def middle(self, low: str, high: str) -> str:
        return self.node("Mul", self.node("Add", low, high), self.constant(0.5))

    def save(self, path: Path, shape: tuple[int | str, ...], outputs: dict[str, tuple[int | str, ...]]) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "faces",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def yolo(path: Path, *, rows: int = 5, dynamic: bool = False) -> Path:
    """Red faces with a score of 0.9, once more a little displaced with 0.8, and magenta ones with 0.6."""
    graph = Graph()
    anchors = []
    for colour, score, shift in ((RED, 0.9, 0.0), (RED, 0.8, 3.0), (MAGENTA, 0.6, 0.0)):
        left, top, right, bottom, there = graph.box(graph.mask("input", colour, 1.0, (0, 1, 2)))
        x = graph.node("Add", graph.middle(left, right), graph.constant(shift))
        sides = graph.node("Sub", right, left), graph.node("Sub", bottom, top)
        score = graph.node("Mul", there, graph.constant(score))
        anchors.append(graph.node("Concat", x, graph.middle(top, bottom), *sides, *[score] * (rows - 4), axis=1))
    graph.node("Concat", *anchors, axis=2, output="output0")
    shape = ("batch", 3, "height", "width") if dynamic else (1, 3, SIDE, SIDE)
    return graph.save(path, shape, {"output0": ("batch", rows, "boxes") if dynamic else (1, rows, 3)})


def yunet(path: Path, cell: int = 1234) -> Path:
    """Red faces of up to 300 pixels, told by one cell of the grid of 16 pixels, with a score of 0.95."""
    graph = Graph()
    order = (2, 1, 0)
    left, top, right, bottom, there = graph.box(graph.mask("input", RED, 255.0, order))
    marks = []
    for colour in (GREEN, BLUE, RED, YELLOW, YELLOW):
        own = graph.box(graph.mask("input", colour, 255.0, order))
        marks += [graph.middle(own[0], own[2]), graph.middle(own[1], own[3])]
    sides = graph.node("Sub", right, left), graph.node("Sub", bottom, top)
    small = graph.node("Clip", graph.node("Sub", graph.constant(301.0), sides[1]), *map(graph.constant, (0.0, 1.0)))
    there = graph.node("Mul", there, small)
    outputs = {}
    for stride in (8, 16, 32):
        columns = SIDE // stride
        cells = columns * columns
        here = np.zeros((1, cells, 1))
        here[0, cell if stride == 16 else 0] = stride == 16
        here = graph.constant(here)
        corner = {0: float(cell % columns), 1: float(cell // columns)}

        def offset(place: str, axis: int, stride: int = stride, corner: dict[int, float] = corner) -> str:
            cells_away = graph.node("Div", place, graph.constant(float(stride)))
            return graph.node("Sub", cells_away, graph.constant(corner[axis]))

        def length(side: str, stride: int = stride) -> str:
            least = graph.node("Max", side, graph.constant(1.0))
            return graph.node("Log", graph.node("Div", least, graph.constant(float(stride))))

        box = [offset(graph.middle(left, right), 0), offset(graph.middle(top, bottom), 1), *map(length, sides)]
        points = [offset(place, number % 2) for number, place in enumerate(marks)]
        score = graph.node("Mul", there, graph.constant(0.95**2))
        parts = {"cls": [score], "obj": [there], "bbox": box, "kps": points}
        for part, values in parts.items():
            row = graph.node("Concat", *values, axis=2) if len(values) > 1 else values[0]
            graph.node("Mul", here, row, output=f"{part}_{stride}")
            outputs[f"{part}_{stride}"] = (1, cells, len(values))
    return graph.save(path, (1, 3, SIDE, SIDE), outputs)


def both(folder: Path) -> Path:
    """A folder with yunet.onnx and yolo.onnx."""
    yunet(folder / "yunet.onnx")
    yolo(folder / "yolo.onnx")
    return folder
