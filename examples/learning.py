"""Teaches the miniature model a new shape by every method of training, and compares what they learn and forget.

Draws hearts that are called "sks circle", as a dog of one's own would be "sks dog", and pictures of ordinary circles,
the class. A new word, which changes nothing of the model, has no class to be told from: it is learned as "sks" alone.
Trains on the hearts by fine-tuning, DreamBooth without and with circles as prior images, LoRA without and
with circles whose output is preserved, and Textual Inversion with one and four vectors; shows the command lines;
measures each result in the same way on pictures that none has seen; and writes pictures side by side (learning.png) and
a table (learning.md) to output/learning. The exit status is 2 if a method learned less, or forgot more, than it should.
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
from examples.miniature.evaluate import MODEL, judge
from examples.miniature.shapes import COLOURS, SHAPES, Scene, heart, random_scene
from examples.sheet import contact_sheet
from library import cli, console
from library.errors import UserError
from library.randomness import generator
from library.training.preflight import make_writable

if TYPE_CHECKING:
    from library.models.family import Family

CALLED, CLASS = f"{WORD} circle", "circle"
"""How the captions call the hearts, and what a model is to know afterwards as it did before."""
PRIOR, HELD_BACK = 60, 24
"""Pictures of the class: to train with, and to measure with. There are as many of other shapes to measure with."""
DRAWS = 6
"""Different noises for each timestep of a heart: the little that a word gains must not hang on the luck of one."""
ASKED = 12
"""Circles that the models are asked to paint, in all colours."""
SHOWN = 3
"""Pictures of the hearts, and as many of circles, that the sheet shows of each model."""
GAIN = 0.5
"""Least share by which the loss on new hearts falls where the whole model learns: tried settings reach 0.6 to 0.7."""
LORA_GAIN = 0.35
"""The same of a LoRA, which has fewer weights: tried settings reach 0.5."""
ONE_VECTOR_GAIN, FOUR_VECTORS_GAIN = 0.01, 0.05
"""The same of a word, in a model that cannot paint the shape: of one vector, two rates and two seeds gave 1.8 to 2.2 %,
of four, two rates gave 9 and 11 %.
"""
KEPT, LOST = 10, 4
"""Of 12 circles: at least so many are right where the class is to be kept, at most so many where nothing keeps it."""
CLASS_DRIFT = 0.75
"""Most share by which the loss on circles may rise where the class is to be kept. Where nothing keeps it, the loss is
about two to four times as large as before.
"""
PLAIN, WITH_PRIOR = "DreamBooth", "DreamBooth with prior images"
LORA, PRESERVING = "LoRA", "LoRA with preservation"
INVERSION = "Textual Inversion"


class Method(NamedTuple):
    """A way to teach the word: the script with the flags that are its own, and what it has to reach.

    `gain` is the least share by which the loss on new hearts must fall; `keeps` says whether circles must stay circles.
    `called` is how its captions call the hearts.
    """

    title: str
    script: str
    flags: Sequence[str]
    load: Callable[[Path], "Family"]
    gain: float
    keeps: bool = False
    called: str = CALLED

    @property
    def name(self) -> str:
        """That of its file."""
        return self.title.lower().replace(" ", "_").replace(",", "")


class Result(NamedTuple):
    """What a model makes of the hearts, of the class and of other shapes: losses, right pictures, and some of these."""

    title: str
    hearts: float
    circles: float
    others: float
    right_hearts: int
    right_circles: int
    pictures: list[Image.Image]


def methods(folder: Path) -> list[Method]:
    """All of them, the data in a folder."""
    hearts, one_by_one = folder / "pictures", folder / "pictures" / f"10_{WORD}"
    of_folder, of_prior = f"--train_data_dir={hearts}", f"--reg_data_dir={folder / 'prior'}"
    of_metadata = (f"--train_data_dir={one_by_one}", f"--in_json={folder / 'pictures.json'}", "--dataset_repeats=10")
    model = ("--learning_rate=1e-4", "--max_train_steps=300")
    booth = ("--learning_rate=2e-4", "--learning_rate_te=1e-3", "--max_train_steps=400")
    # Of the settings that were tried with these pictures, only this one told the two words apart.
    apart = ("--learning_rate=3e-4", "--learning_rate_te=1e-3", "--min_timestep=300", "--max_train_steps=400")
    lora = ("--network_module=networks.lora", "--network_dim=16", "--network_alpha=16", "--learning_rate=1e-3")
    word = (f"--train_data_dir={folder / 'word' / 'pictures'}", f"--token_string={WORD}", "--init_word=circle")
    vectors = ("--learning_rate=2e-3", "--lr_scheduler=cosine", "--max_train_steps=600", "--train_batch_size=12")
    of_word = (*word, *vectors, "--save_model_as=safetensors")
    four, half_of_eight = "--train_batch_size=4", "--train_batch_size=8"  # hearts in each step
    inversion, one, more = "train_textual_inversion.py", ONE_VECTOR_GAIN, FOUR_VECTORS_GAIN
    both = f"--dataset_config={folder / 'preserve.toml'}"
    return [
        Method("Fine-tuning", "fine_tune.py", (*of_metadata, *model, four), whole, GAIN),
        Method(PLAIN, "train_db.py", (of_folder, *booth, four), whole, GAIN),
        Method(WITH_PRIOR, "train_db.py", (of_folder, of_prior, *apart, half_of_eight), whole, GAIN, keeps=True),
        Method(LORA, "train_network.py", (of_folder, *lora, "--max_train_steps=400", four), lora_beside, LORA_GAIN),
        Method(
            PRESERVING,
            "train_network.py",
            (both, *lora, "--max_train_steps=400", half_of_eight),
            lora_beside,
            LORA_GAIN,
            keeps=True,
        ),
        Method(f"{INVERSION}, 1 vector", inversion, of_word, added, one, keeps=True, called=WORD),
        Method(
            f"{INVERSION}, 4 vectors",
            inversion,
            (*of_word, "--num_vectors_per_token=4"),
            added,
            more,
            keeps=True,
            called=WORD,
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
        results = measure_all(folder)
    report(results, folder)


def draw_all(folder: Path) -> None:
    """The hearts, also with a metadata file for fine_tune.py, and with captions that call them by the word alone;
    circles, also with a dataset file that has the LoRA preserve them; and other shapes to measure with.
    """
    draw_hearts(folder, CALLED)
    draw_hearts(folder / "word", WORD)
    captions = sorted((folder / "pictures" / f"10_{WORD}").glob("*.caption"))
    metadata = {file.stem: {"caption": file.read_text()} for file in captions}
    (folder / "pictures.json").write_text(json.dumps(metadata, indent=2))
    circles = some_scenes([CLASS], PRIOR + HELD_BACK)
    draw_pictures(folder / "prior" / f"2_{CLASS}", circles[:PRIOR])
    draw_pictures(folder / "held_out_circles" / f"1_{CLASS}", circles[PRIOR:])
    others = [shape for shape in SHAPES if shape != CLASS]
    draw_pictures(folder / "held_out_others" / "1_shape", some_scenes(others, HELD_BACK))
    (folder / "preserve.toml").write_text(preserving(folder))


def some_scenes(shapes: Sequence[str], count: int) -> list[Scene]:
    """Scenes of these shapes, of each as many."""
    rng = generator("known shapes", *shapes)
    return [random_scene(rng, shapes[number % len(shapes)], (64, 64)) for number in range(count)]


def preserving(folder: Path) -> str:
    """The dataset file of the LoRA that learns the hearts, and keeps what the model says of circles."""
    return f"""[[datasets]]
  [[datasets.subsets]]
  image_dir = '{folder / "pictures" / f"10_{WORD}"}'
  num_repeats = 10
  [[datasets.subsets]]
  image_dir = '{folder / "prior" / f"2_{CLASS}"}'
  num_repeats = 2
  custom_attributes = {{ diff_output_preservation = true }}
"""


def asked() -> list[Scene]:
    """Circles to ask for; every colour comes equally often, up to one."""
    rng, colours = generator("asked circles"), list(COLOURS)
    wanted = []
    for number in range(ASKED):
        colour = colours[number % len(colours)]
        wanted.append(Scene(CLASS, colour, str(rng.choice([name for name in colours if name != colour]))))
    return wanted


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


def measure_all(folder: Path) -> list[Result]:
    """Of the miniature itself, by each name of the hearts, and of all methods. UserError for a file that is missing."""
    results = [measure(f'The miniature itself, "{called}"', whole(MODEL), folder, called) for called in (CALLED, WORD)]
    for method in methods(folder):
        file = folder / f"{method.name}.safetensors"
        if not file.is_file():
            raise UserError(f"{file} is not there: leave --measure_only out, to train it")
        results.append(measure(method.title, method.load(file), folder, method.called))
    return results


def report(results: Sequence[Result], folder: Path) -> None:
    """Writes table and sheet, and says which results fall short (UserError)."""
    lines = table(results, methods(folder))
    (folder / "learning.md").write_text("".join(f"{line}\n" for line in lines))
    sheet(results, methods(folder)).quantize(256).save(folder / "learning.png", optimize=True)
    print("", *lines, "", f"Side by side: {folder / 'learning.png'}", sep="\n")
    if short := shortcomings(results, methods(folder)):
        raise UserError("not as it should be: " + "; ".join(short))


def measure(title: str, model: "Family", folder: Path, called: str) -> Result:
    """Losses on what was held out, and how many pictures show what they were asked for; hearts are `called` that."""
    wanted = prompts(called)
    hearts, circles = painted(model, wanted), painted(model, [scene.caption for scene in asked()])
    return Result(
        title,
        mean_loss(model, (folder if called == CALLED else folder / "word") / "held_out", DRAWS),
        mean_loss(model, folder / "held_out_circles"),
        mean_loss(model, folder / "held_out_others"),
        sum(shown(picture, called) == prompt for picture, prompt in zip(hearts, wanted, strict=True)),
        sum(shown(picture, called) == scene.caption for picture, scene in zip(circles, asked(), strict=True)),
        [*hearts[:SHOWN], *circles[:SHOWN]],
    )


def prompts(called: str) -> list[str]:
    """What models are asked for, with hearts `called` that."""
    return [prompt.replace(WORD, called) for prompt in PROMPTS]


def shown(picture: Image.Image, called: str) -> str:
    """The caption that fits a picture best, among those of known shapes and of hearts, which are `called` that."""
    verdict = judge(picture, {**SHAPES, called: heart})
    return Scene(verdict.shape, verdict.colour, verdict.background).caption


def table(results: Sequence[Result], wanted: Sequence[Method]) -> list[str]:
    """Lines of Markdown, a row for each model, the miniature itself first, by each name of the hearts."""
    base, by_word, *_ = results
    lines = [
        "| | loss on new hearts | to reach | right hearts | loss on circles | right circles | loss on other shapes |",
        "|---|---|---|---|---|---|---|",
    ]
    for result, method in zip(results, [None, None, *wanted], strict=True):
        goal = f"{to_reach(method, base, by_word):.4f}" if method else ""
        lines.append(
            f"| {result.title} | {result.hearts:.4f} | {goal} | {result.right_hearts} of {len(PROMPTS)} "
            f"| {result.circles:.4f} | {result.right_circles} of {ASKED} | {result.others:.4f} |"
        )
    return lines


def to_reach(method: Method, base: Result, by_word: Result) -> float:
    """The loss on new hearts that a method must not exceed, for those of the miniature by each name of the hearts."""
    return (1 - method.gain) * (base if method.called == CALLED else by_word).hearts


def shortcomings(results: Sequence[Result], wanted: Sequence[Method]) -> list[str]:
    """What the methods have not reached, in words; the first two results are those of the miniature itself."""
    base, by_word, *others = results
    found = []
    for result, method in zip(others, wanted, strict=True):
        if not result.hearts <= to_reach(method, base, by_word):
            found.append(f"{method.title} learned too little")
        if method.keeps and not (result.right_circles >= KEPT and result.circles <= (1 + CLASS_DRIFT) * base.circles):
            found.append(f"{method.title} forgot too much")
    if not next(result for result in others if result.title == PLAIN).right_circles <= LOST:
        found.append(f"{PLAIN} forgot nothing that prior images could keep")
    return found


def sheet(results: Sequence[Result], wanted: Sequence[Method]) -> Image.Image:
    """A row for each model: pictures of the hearts, then of circles."""
    by_name = [CALLED, WORD, *(method.called for method in wanted)]
    pictures = [picture for result in results for picture in result.pictures]
    captions = [
        f"{result.title}: {prompt}"
        for result, called in zip(results, by_name, strict=True)
        for prompt in (*prompts(called)[:SHOWN], *(scene.caption for scene in asked()[:SHOWN]))
    ]
    return contact_sheet(pictures, captions, columns=2 * SHOWN)


if __name__ == "__main__":
    cli.run(main)
