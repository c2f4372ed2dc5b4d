"""Teaches the miniature model a new shape by every method of training, and compares what they learn and forget.

Draws hearts that are called "sks", and pictures of the six shapes that the model knows. Trains on them by fine-tuning,
DreamBooth without and with the known shapes as prior images, LoRA, and Textual Inversion with one and four vectors;
shows the command lines; measures each result in the same way on pictures that none has seen; and writes pictures side
by side (learning.png) and a table (learning.md) to output/learning. The exit status is 2 if a method learned less, or
forgot more, than it should.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from examples.commands import LAUNCH, ROOT, run, shortest, show
from examples.hearts import PROMPTS, WORD, draw_hearts, draw_pictures
from examples.measuring import mean_loss, painted, with_lora, with_word
from examples.miniature.evaluate import MODEL, judge, scenes
from examples.miniature.shapes import SHAPES, Scene, heart, random_scene
from examples.sheet import contact_sheet
from library import cli, console
from library.errors import UserError
from library.randomness import generator
from library.training.preflight import make_writable

if TYPE_CHECKING:
    from library.models.family import Family

PRIOR, KNOWN = 60, 24
"""Pictures of known shapes: to train with, and to measure with."""
ASKED = tuple(scenes(12))
"""Known shapes that the models are asked to paint, two of each."""
SHOWN = 3
"""Pictures of the word, and as many of known shapes, that the sheet shows of each model."""
WITHOUT_PRIOR, WITH_PRIOR = "DreamBooth", "DreamBooth with prior images"
INVERSION = "Textual Inversion"


class Method(NamedTuple):
    """A way to teach the word: the script with the flags that are its own, and what it has to reach.

    `gain` is the least share by which the loss on new hearts must fall, `drift`, where the method is to keep what was
    known, the most by which that on new pictures of known shapes may rise.
    """

    title: str
    script: str
    flags: Sequence[str]
    load: Callable[[Path], "Family"]
    gain: float
    drift: float | None = None

    @property
    def name(self) -> str:
        """That of its file."""
        return self.title.lower().replace(" ", "_").replace(",", "")


class Result(NamedTuple):
    """What a model makes of the hearts and of what it knew before."""

    title: str
    hearts: float
    known: float
    right_hearts: int
    right_known: int
    pictures: list[Image.Image]


def methods(folder: Path) -> list[Method]:
    """All of them, the data in a folder."""
    hearts, one_by_one = folder / "pictures", folder / "pictures" / f"10_{WORD}"
    of_folder, of_prior = f"--train_data_dir={hearts}", f"--reg_data_dir={folder / 'prior'}"
    of_metadata = (f"--train_data_dir={one_by_one}", f"--in_json={folder / 'pictures.json'}", "--dataset_repeats=10")
    model = ("--learning_rate=1e-4", "--max_train_steps=300")
    lora = ("--network_module=networks.lora", "--network_dim=16", "--network_alpha=16")
    quick = ("--learning_rate=1e-3", "--max_train_steps=600")
    word = (f"--token_string={WORD}", "--init_word=circle", "--save_model_as=safetensors")
    vectors = ("--learning_rate=1e-2", "--lr_scheduler=cosine", "--max_train_steps=1000")
    four, half_of_eight = "--train_batch_size=4", "--train_batch_size=8"  # hearts in each step
    inversion = "train_textual_inversion.py"
    return [
        Method("Fine-tuning", "fine_tune.py", (*of_metadata, *model, four), whole, 0.35),
        Method(WITHOUT_PRIOR, "train_db.py", (of_folder, *model, four), whole, 0.35),
        Method(WITH_PRIOR, "train_db.py", (of_folder, of_prior, *model, half_of_eight), whole, 0.35, 0.3),
        Method("LoRA", "train_network.py", (of_folder, *lora, *quick, four), lora_beside, 0.25),
        Method(f"{INVERSION}, 1 vector", inversion, (of_folder, *word, *vectors, four), added, 0.0, 0.001),
        Method(
            f"{INVERSION}, 4 vectors",
            inversion,
            (of_folder, *word, "--num_vectors_per_token=4", *vectors, four),
            added,
            0.05,
            0.001,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "learning")
    parser.add_argument(
        "--measure_only", action="store_true", help="train nothing, and measure what an earlier run has left there"
    )
    arguments = parser.parse_args()
    folder = shortest(arguments.output_dir)
    console.setup(None)
    if not MODEL.is_file():
        raise UserError(f"the miniature model {MODEL} is missing: get it with git, or train it as its README says")
    make_writable("--output_dir", str(folder))
    draw_all(folder)
    if not arguments.measure_only:
        for method in methods(folder):
            command = training_command(method, folder)
            print(f"{method.title}:", show(command), sep="\n\n", end="\n\n", flush=True)
            run(command)
    with console.quiet_dependencies():
        report(folder)


def draw_all(folder: Path) -> None:
    """The hearts, also with a metadata file for fine_tune.py, and pictures of the shapes that the model knows."""
    draw_hearts(folder)
    captions = sorted((folder / "pictures" / f"10_{WORD}").glob("*.caption"))
    metadata = {file.stem: {"caption": file.read_text()} for file in captions}
    (folder / "pictures.json").write_text(json.dumps(metadata, indent=2))
    known = known_scenes(PRIOR + KNOWN)
    draw_pictures(folder / "prior" / "2_shape", known[:PRIOR])
    draw_pictures(folder / "held_out_known" / "1_shape", known[PRIOR:])


def known_scenes(count: int) -> list[Scene]:
    """Scenes of the shapes that the model knows, of each as many."""
    rng, shapes = generator("known shapes"), list(SHAPES)
    return [random_scene(rng, shapes[number % len(shapes)], (64, 64)) for number in range(count)]


def training_command(method: Method, folder: Path) -> list[str]:
    """The command line of the training, as a user would type it."""
    return [
        *(*LAUNCH, "--num_cpu_threads_per_process=1", str(shortest(ROOT / method.script))),
        f"--pretrained_model_name_or_path={shortest(MODEL)}",
        *method.flags,
        *("--resolution=64", "--cache_latents", "--seed=1", "--max_data_loader_n_workers=1"),
        *(f"--output_dir={folder}", f"--output_name={method.name}"),
    ]


def whole(file: Path) -> "Family":
    """A model that was trained itself."""
    from library.models.registry import load_model

    return load_model(file)


def lora_beside(file: Path) -> "Family":
    """The miniature with a LoRA."""
    model = whole(MODEL)
    with_lora(model, file)
    return model


def added(file: Path) -> "Family":
    """The miniature with vectors for the word."""
    model = whole(MODEL)
    with_word(model, WORD, file)
    return model


def report(folder: Path) -> None:
    """Measures all results, writes table and sheet, and says which fall short (UserError)."""
    results = [measure("The miniature itself", whole(MODEL), folder)]
    for method in methods(folder):
        file = folder / f"{method.name}.safetensors"
        if not file.is_file():
            raise UserError(f"{file} is not there: leave --measure_only out, to train it")
        results.append(measure(method.title, method.load(file), folder))
    lines = table(results, methods(folder))
    (folder / "learning.md").write_text("".join(f"{line}\n" for line in lines))
    sheet(results).save(folder / "learning.png", optimize=True)
    print("", *lines, "", f"Side by side: {folder / 'learning.png'}", sep="\n")
    if short := shortcomings(results, methods(folder)):
        raise UserError("not as it should be: " + "; ".join(short))


def measure(title: str, model: "Family", folder: Path) -> Result:
    """Losses on what was held out, and how many pictures show what they were asked for."""
    hearts, known = painted(model, PROMPTS), painted(model, [scene.caption for scene in ASKED])
    return Result(
        title,
        mean_loss(model, folder / "held_out"),
        mean_loss(model, folder / "held_out_known"),
        sum(shown(picture) == prompt for picture, prompt in zip(hearts, PROMPTS, strict=True)),
        sum(shown(picture) == scene.caption for picture, scene in zip(known, ASKED, strict=True)),
        [*hearts[:SHOWN], *known[:SHOWN]],
    )


def shown(picture: Image.Image) -> str:
    """The caption that fits a picture best, among those of known shapes and hearts."""
    verdict = judge(picture, {**SHAPES, WORD: heart})
    return Scene(verdict.shape, verdict.colour, verdict.background).caption


def table(results: Sequence[Result], wanted: Sequence[Method]) -> list[str]:
    """Lines of Markdown, a row for each model, the miniature itself first."""
    base = results[0]
    lines = [
        "| | loss on new hearts | to reach | loss on known shapes | to keep | right hearts | right known shapes |",
        "|---|---|---|---|---|---|---|",
    ]
    for result, method in zip(results, [None, *wanted], strict=True):
        gain = f"{(1 - method.gain) * base.hearts:.4f}" if method else ""
        drift = f"{(1 + method.drift) * base.known:.4f}" if method and method.drift is not None else ""
        lines.append(
            f"| {result.title} | {result.hearts:.4f} | {gain} | {result.known:.4f} | {drift} "
            f"| {result.right_hearts} of {len(PROMPTS)} | {result.right_known} of {len(ASKED)} |"
        )
    return lines


def shortcomings(results: Sequence[Result], wanted: Sequence[Method]) -> list[str]:
    """What the methods have not reached, in words; the first result is that of the miniature itself."""
    base, *others = results
    found = []
    for result, method in zip(others, wanted, strict=True):
        if not result.hearts <= (1 - method.gain) * base.hearts:
            found.append(f"{method.title} learned too little")
        if method.drift is not None and not result.known <= (1 + method.drift) * base.known:
            found.append(f"{method.title} forgot too much")
    known = {method.title: result.known for result, method in zip(others, wanted, strict=True)}
    if not known[WITH_PRIOR] < known[WITHOUT_PRIOR]:
        found.append("prior images made no difference")
    return found


def sheet(results: Sequence[Result]) -> Image.Image:
    """A row for each model: pictures of the word, then of shapes that the miniature knows."""
    prompts = [*PROMPTS[:SHOWN], *(scene.caption for scene in ASKED[:SHOWN])]
    pictures = [picture for result in results for picture in result.pictures]
    captions = [f"{result.title}: {prompt}" for result in results for prompt in prompts]
    return contact_sheet(pictures, captions, columns=2 * SHOWN)


if __name__ == "__main__":
    cli.run(main)
