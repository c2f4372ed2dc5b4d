"""How busy tagging keeps its model: the script's loop against the model alone, and against a plain sequential loop.

    python benchmarks/tagging.py [--batch_sizes N N N] [--pictures N] [--threads N] [--rounds N] [--blocks N]

Makes a vision transformer as large as the usual taggers (768 numbers per place, 12 blocks, pictures of 448 pixels) with
random weights, and JPEG files of 1500x1000 pixels. Tags them with the functions of
finetune/tag_images_by_wd14_tagger.py; the baselines, in the same run, are the same model on prepared arrays, and a loop
that decodes, tags and writes one batch after the other. Wanted of the script's loop: at most 1.1 of the model alone.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import feeding
from library import console
from library.options.tag_images import TagImagesOptions
from library.preprocessing.tagging.folder import tag_pictures, white_square
from library.preprocessing.tagging.results import TagFiles
from library.preprocessing.tagging.rules import Tag, TagRules
from library.preprocessing.tagging.tagger import Tagger
from library.preprocessing.tally import Tally, batched

SIDE, PATCH, WIDTH, HEADS, TAGS = 448, 16, 768, 12, 9000


def main() -> None:
    options = feeding.arguments(__doc__, blocks=12)
    console.setup(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model.onnx", options.blocks)
        pictures = feeding.save_pictures(folder / "pictures", options.pictures)
        tagger = Tagger(folder / "model.onnx", TAGS)
        rules = TagRules(
            [Tag(f"tag_{number}", "general") for number in range(TAGS)], TagImagesOptions(train_data_dir=folder)
        )
        print(f"{len(pictures)} pictures of {feeding.SIZE}, {options.threads} threads, on {tagger.provider}")
        feeding.time_of_writing(folder)
        for size in options.batch_sizes:
            measure(tagger, rules, pictures, size, options.threads, options.rounds)


def measure(tagger: Tagger, rules: TagRules, pictures: list[Path], size: int, threads: int, rounds: int) -> None:
    """Print what the three loops take with batches of a size."""
    batches = [np.stack(batch) for batch in batched([white_square(picture, SIDE) for picture in pictures], size)]

    def alone() -> None:
        for batch in batches:
            tagger.probabilities(batch)

    def tool() -> None:
        results = TagFiles(pictures[0].parent, ".txt", ", ", append=False, force=False)
        tag_pictures(pictures, results, tagger, rules, Tally(), batch_size=size, threads=threads, debug=False)

    def one_after_another() -> None:
        for batch in batched(pictures, size):
            found = tagger.probabilities(np.stack([white_square(picture, SIDE) for picture in batch]))
            for picture, row in zip(batch, found, strict=True):
                picture.with_suffix(".txt").write_text(", ".join(rules.names(row)))

    tagger.probabilities(batches[0])  # the first run sets it up
    loops = {"model alone": alone, "the script's loop": tool, "one after another": one_after_another}
    feeding.compare(f"batches of {size}", loops, len(pictures), rounds)


def write_model(path: Path, blocks: int) -> None:
    """A vision transformer with random weights, from pictures (B, 448, 448, 3) to probabilities."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights = [], {}

    def node(kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def weight(value: np.ndarray) -> str:
        name = f"weight{len(weights)}"
        weights[name] = value
        return name

    def linear(value: str, inputs: int, outputs: int) -> str:
        matrix = weight(rng.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32))
        return node("Add", node("MatMul", value, matrix), weight(np.zeros(outputs, np.float32)))

    def norm(value: str) -> str:
        ones, zeros = weight(np.ones(WIDTH, np.float32)), weight(np.zeros(WIDTH, np.float32))
        return node("LayerNormalization", value, ones, zeros, axis=-1)

    def attention(value: str) -> str:
        split = weight(np.array([0, -1, HEADS, WIDTH // HEADS]))
        queries, keys, values = (node("Reshape", linear(value, WIDTH, WIDTH), split) for _ in range(3))
        queries, values = (node("Transpose", part, perm=[0, 2, 1, 3]) for part in (queries, values))
        keys = node("Transpose", keys, perm=[0, 2, 3, 1])
        scaled = node("Mul", node("MatMul", queries, keys), weight(np.float32((WIDTH // HEADS) ** -0.5)))
        mixed = node("Transpose", node("MatMul", node("Softmax", scaled, axis=-1), values), perm=[0, 2, 1, 3])
        return linear(node("Reshape", mixed, weight(np.array([0, -1, WIDTH]))), WIDTH, WIDTH)

    planes = node("Transpose", node("Div", "pictures", weight(np.float32(255))), perm=[0, 3, 1, 2])
    kernels = weight(rng.normal(0, 0.03, (WIDTH, 3, PATCH, PATCH)).astype(np.float32))
    places = node("Conv", planes, kernels, strides=[PATCH, PATCH])
    value = node("Transpose", node("Reshape", places, weight(np.array([0, WIDTH, -1]))), perm=[0, 2, 1])
    for _ in range(blocks):
        value = node("Add", value, attention(norm(value)))
        inner = linear(norm(value), WIDTH, 4 * WIDTH)
        gate = node("Mul", inner, node("Sigmoid", node("Mul", inner, weight(np.float32(1.702)))))
        value = node("Add", value, linear(gate, 4 * WIDTH, WIDTH))
    mean = node("ReduceMean", norm(value), axes=[1], keepdims=0)
    result = node("Sigmoid", linear(mean, WIDTH, TAGS))
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("pictures", TensorProto.FLOAT, [None, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [None, TAGS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


if __name__ == "__main__":
    main()
