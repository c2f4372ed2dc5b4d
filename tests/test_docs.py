"""What the docs promise to tell is there, and what they say to type is understood."""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library import cli, options
from library.options import Option, options_of
from library.options.cache_tool import CacheToolOptions
from library.options.canny import CannyOptions
from library.options.clean_captions import CleanCaptionsOptions
from library.options.convert import ConvertOptions
from library.options.detect_faces import DetectFacesOptions
from library.options.make_captions import MakeCaptionsOptions
from library.options.make_captions_by_git import MakeCaptionsByGitOptions
from library.options.merge_metadata import MergeCaptionsOptions, MergeTagsOptions
from library.options.merge_models import MergeModelsOptions
from library.options.prepare_latents import PrepareLatentsOptions
from library.options.resize_images import ResizeImagesOptions
from library.options.tag_images import TagImagesOptions
from library.options.work import WorkOptions
from tests.tiny import draw_pictures

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "examples" / "miniature" / "README.md"]
SHAPING = (
    options.ObjectiveOptions,
    options.OptimizerOptions,
    options.SchedulerOptions,
    options.EmaOptions,
    options.PrecisionOptions,
    options.MemoryOptions,
    options.AttentionOptions,
)
METHODS = {
    "train_network": options.NetworkOptions,
    "dreambooth": options.DreamBoothOptions,
    "fine_tune": options.FineTuneOptions,
    "sdxl": options.SdxlFineTuneOptions,
    "textual_inversion": options.TextualInversionOptions,
}
TRAINING = (*METHODS.values(), *options.TRAINING, options.SdxlOptions)
TOOLS = (
    CacheToolOptions,
    CannyOptions,
    CleanCaptionsOptions,
    ConvertOptions,
    DetectFacesOptions,
    MakeCaptionsByGitOptions,
    MakeCaptionsOptions,
    MergeModelsOptions,
    MergeCaptionsOptions,
    MergeTagsOptions,
    PrepareLatentsOptions,
    ResizeImagesOptions,
    TagImagesOptions,
    WorkOptions,
)
TEXT = (ROOT / "docs" / "training_options.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| `--") and line.count("|") in (4, 5)]
NUMBERS = re.compile(r"\d[\d.]*(?:e-?\d+)?")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(?:\w+/)*\w+\.py")
PREPARING = ("tools/quickstart.py", "tests/run.py")
"""They make the environment and hand their arguments on."""

FILES = ("--train_data_dir", "--reg_data_dir", "--in_json", "--sample_prompts", "--output_dir", "--logging_dir")
SMALL = {
    "--resolution": 32,
    "--max_train_steps": 2,
    "--lr_warmup_steps": 1,
    "--stop_text_encoder_training": 1,
    "--save_every_n_steps": 1,
    "--sample_every_n_steps": 1,
    "--validate_every_n_steps": 1,
}


class Understood(Exception):
    """A script has read its command line."""


def blocks(page: Path, language: str) -> Iterator[str]:
    """What is set apart on a page in a language."""
    for indent, named, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if named == language:
            yield textwrap.dedent(text) if indent else text


def commands(page: Path) -> Iterator[list[str]]:
    """The scripts of the repository that a page says to call, each with its arguments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if SCRIPT.fullmatch(word) and (ROOT / word).is_file():
                    yield [word, *(other for other in words[place + 1 :] if other != "...")]
                    break


def explained(page: Path) -> set[str]:
    """The flags in the first column of a page's tables."""
    text = page.read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    return {flag for cell in cells for flag in re.findall(r"--(\w+)", cell)}


def names(group: type) -> set[str]:
    return {option.name for option in options_of(group)}


COMMANDS = [command for page in PAGES for command in commands(page) if command[0] not in PREPARING]
WHOLE = [  # a tiny model has other blocks, and what several scripts make together tests/test_walk.py does
    command
    for command in COMMANDS
    if any(word.startswith("--train_data_dir") for word in command)
    and not any(word.startswith(("--block_lr", "--in_json=meta_lat.json")) for word in command)
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[0]).stem)
def test_commands_are_understood_by_their_scripts(command, tmp_path, monkeypatch, fresh_console) -> None:
    script, *words = command
    for word in words:
        if word.endswith(".toml"):
            (tmp_path / word.rpartition("=")[2]).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(cli, "parse", only(cli.parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only(argparse.ArgumentParser.parse_args))
    with pytest.raises(Understood):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()


@pytest.mark.slow
@pytest.mark.parametrize("command", WHOLE, ids=lambda command: Path(command[0]).stem)
def test_whole_commands_run_to_their_end(command, fork_server, model_files, tmp_path) -> None:
    script, *words = command
    shown = draw_pictures(tmp_path / "my_dog" / "2_sks dog", 4)
    for file in shown.glob("*.txt"):
        file.write_text("a photo of sks mychar4")
        file.with_suffix(".caption").write_text(file.read_text())
    draw_pictures(tmp_path / "dogs" / "1_dog", 3)
    captions = {file.stem: {"caption": "a circle"} for file in draw_pictures(tmp_path / "drawings", 4).glob("*.png")}
    (tmp_path / "drawings.json").write_text(json.dumps(captions))
    (tmp_path / "prompts.txt").write_text("a photo of sks dog --w 32 --h 32 --s 2")
    model = model_files("sdxl" if script.startswith("sdxl") else "sd1")
    ended = fork_server.run([smaller(word, tmp_path, model) for word in words], Path(script).stem)
    assert ended.status == 0, ended.said
    (name,) = (word.partition("=")[2] for word in words if word.startswith("--output_name="))
    assert list((tmp_path / "output").glob(f"{name}.*"))


def smaller(word: str, folder: Path, model: Path) -> str:
    """A word of a command, with a tiny model, few small pictures and few steps instead."""
    flag, _, value = word.partition("=")
    if flag == "--enable_bucket":
        return "--bucket_reso_steps=4"
    if flag == "--pretrained_model_name_or_path":
        return f"{flag}={model}"
    if flag in FILES:
        return f"{flag}={folder / value}"
    return f"{flag}={SMALL[flag]}" if flag in SMALL else word


def only(parse: Callable[..., object]) -> Callable[..., None]:
    """The same parser, after which nothing more is done."""

    def read(*arguments: object, **keywords: object) -> None:
        parse(*arguments, **keywords)
        raise Understood

    return read


@pytest.mark.parametrize("page", METHODS)
def test_a_methods_page_shows_its_command_and_explains_every_flag_of_its_own(page: str) -> None:
    path = ROOT / "docs" / f"{page}.md"
    assert names(METHODS[page]) <= explained(path)
    assert any(commands(path))


def test_every_flag_of_training_is_on_some_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    told = set(re.findall(r"--(\w+)", text)) | set(re.findall(r"`(\w+)`", text))
    assert {name for group in TRAINING for name in names(group)} <= told


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_only_flags_that_there_are_are_explained(page: Path) -> None:
    known = {name for group in (*TRAINING, *TOOLS) for name in names(group)}
    assert explained(page) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_python_on_a_page_is_python(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)


@pytest.mark.parametrize(
    "option", [option for group in SHAPING for option in options_of(group)], ids=lambda one: one.name
)
def test_every_option_that_shapes_a_step_is_explained_with_its_default(option: Option) -> None:
    rows = [row for row in ROWS if re.search(rf"`--{option.name}[ `]", row.split("|")[1])]
    (row,) = rows
    default = row.rstrip("| ").rpartition("|")[2]
    if type(option.default) in (int, float) and option.default:
        assert option.default in [float(number) for number in NUMBERS.findall(default)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
