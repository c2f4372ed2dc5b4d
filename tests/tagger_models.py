"""Tiny taggers whose answers are known: ONNX models made from a few nodes, and their lists of tags."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RATINGS = (("general", 9), ("sensitive", 9))


def write_tagger(folder: Path, model: onnx.ModelProto, tags: Sequence[tuple[str, object]]) -> Path:
    """A tagger's folder: tags are (name, category)."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    rows = [f"{number},{name},{category},{1000 - number}" for number, (name, category) in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return folder


def constant_tagger(folder: Path) -> Path:
    """A tagger's folder: it finds 1girl, long_hair, a character and the second rating in every picture."""
    tags = [*RATINGS, ("1girl", 0), ("long_hair", 0), ("miku_(vocaloid)", 4)]
    return write_tagger(folder, constant_model([0.2, 0.7, 0.9, 0.4, 0.5]), tags)


def constant_model(probabilities: Sequence[float], side: int = 8) -> onnx.ModelProto:
    """Gives every picture the same probabilities."""
    count = len(probabilities)
    return _model(
        [
            helper.make_node("ReduceMean", ["pictures"], ["mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["none"]),
            helper.make_node("Reshape", ["none", "column"], ["rows"]),
            helper.make_node("Add", ["rows", "answer"], ["probabilities"]),
        ],
        {
            "zero": np.float32(0),
            "column": np.array([-1, 1]),
            "answer": np.array([probabilities], np.float32),
        },
        (None, side, side, 3),
        count,
    )


def mean_model(side: int = 8, batch: int | None = None) -> onnx.ModelProto:
    """Gives the mean of each of the three channels, as a share of 255."""
    return _model(
        [
            helper.make_node("ReduceMean", ["pictures"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Div", ["mean", "white"], ["probabilities"]),
        ],
        {"white": np.float32(255)},
        (batch, side, side, 3),
        3,
    )


def pixel_model(places: Sequence[tuple[int, int]], side: int = 8) -> onnx.ModelProto:
    """Gives the first channel's pixels at these (row, column), as a share of 255."""
    return _model(
        [
            helper.make_node("Reshape", ["pictures", "flat"], ["row"]),
            helper.make_node("Gather", ["row", "places"], ["pixels"], axis=1),
            helper.make_node("Div", ["pixels", "white"], ["probabilities"]),
        ],
        {
            "flat": np.array([-1, side * side * 3]),
            "places": np.array([(row * side + column) * 3 for row, column in places]),
            "white": np.float32(255),
        },
        (None, side, side, 3),
        len(places),
    )


def network_model(tags: int, side: int = 32, seed: int = 0) -> onnx.ModelProto:
    """A small network with random weights."""
    rng = np.random.default_rng(seed)
    return _model(
        [
            helper.make_node("Transpose", ["pictures"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "kernels"], ["features"], strides=[4, 4]),
            helper.make_node("Relu", ["features"], ["active"]),
            helper.make_node("Flatten", ["active"], ["row"]),
            helper.make_node("MatMul", ["row", "matrix"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
        ],
        {
            "kernels": rng.normal(0, 0.005, (16, 3, 4, 4)).astype(np.float32),
            "matrix": rng.normal(0, 0.1, (16 * (side // 4) ** 2, tags)).astype(np.float32),
        },
        (None, side, side, 3),
        tags,
    )


def input_model(shape: Sequence[int | None], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Takes a tensor of this shape, and gives the mean over all but its first and last dimension."""
    axes = list(range(1, len(shape) - 1))
    node = helper.make_node("ReduceMean", ["pictures"], ["probabilities"], axes=axes, keepdims=0)
    return _model([node], {}, shape, shape[-1], kind)


def _model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shape: Sequence[int | None],
    outputs: int,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pictures", kind, list(shape))],
        [helper.make_tensor_value_info("probabilities", kind, [shape[0], outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
