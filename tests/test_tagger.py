"""finetune/tag_images_by_wd14_tagger.py with models whose answers are known, end to end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import tag_images_by_wd14_tagger
from library import cli
from tests import tagger_models
from tests.pictures import picture
from tests.processes import ROOT, python, run
from tests.tagger_models import RATINGS, constant_tagger, write_tagger

SCRIPT = "finetune/tag_images_by_wd14_tagger.py"
TAGS = (*RATINGS, *((f"tag_{number}", 0) for number in range(10)), ("miku_(vocaloid)", 4))

Tool = Callable[..., str]


@pytest.fixture
def tool(monkeypatch, fresh_console, capsys) -> Tool:
    """The script in this process; what it prints."""

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(tag_images_by_wd14_tagger.main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures that are tagged differently, in a folder with a name of many alphabets."""
    for number in range(5):
        picture(tmp_path / "my pictures ÄÖ 絵" / f"{number} é.png", (40 + 9 * number, 30))
    return tmp_path / "my pictures ÄÖ 絵"


@pytest.fixture
def tagger(tmp_path) -> Path:
    """A small network with thirteen tags."""
    return write_tagger(tmp_path / "tagger", tagger_models.network_model(len(TAGS)), TAGS)


@pytest.fixture
def constant(tmp_path) -> Path:
    """Finds the same in every picture."""
    return constant_tagger(tmp_path / "constant")


def texts(folder: Path, extension: str = ".txt") -> dict[str, str]:
    files = sorted(folder.rglob(f"*{extension}"))
    return {file.relative_to(folder).as_posix().removesuffix(extension): file.read_text().strip() for file in files}


# --- where tags go ---


def test_a_command_as_users_give_it(folder, tagger):
    words = [folder, "--model_dir", tagger, "--batch_size", "2", "--max_data_loader_n_workers", "2", "--onnx"]
    ended = run([sys.executable, SCRIPT, *words], 60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "tags: 5 written, 0 skipped, 0 failed, on CPUExecutionProvider\n"
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].lstrip("\r").startswith("tagging: 100%")
    found = texts(folder)
    assert {*found} == {f"{number} é" for number in range(5)}
    assert len({*found.values()}) > 1
    assert {tag for text in found.values() for tag in text.split(", ")} <= {name for name, _ in TAGS}
    again = run([sys.executable, SCRIPT, *words], 60)
    assert (again.returncode, again.stdout) == (0, "tags: 0 written, 5 skipped, 0 failed\n")


def test_neither_batches_nor_threads_change_tags(tool, folder, tagger):
    found = []
    for batch, threads in ((1, 0), (2, 1), (4, 4), (7, 2)):
        tool(folder, "--model_dir", tagger, "--batch_size", batch, "--max_data_loader_n_workers", threads, "--force")
        found.append(texts(folder))
    assert found[1:] == found[:1] * 3


def test_the_ending_of_the_files(tool, folder, constant):
    for flag, ending in (("--caption_extension", "tags"), ("--caption_extention", ".wd")):
        tool(folder, "--model_dir", constant, flag, ending)
        assert len(texts(folder, f".{ending.strip('.')}")) == 5
    assert not texts(folder)


def test_folders_below_only_when_asked_for(tool, folder, constant):
    picture(folder / "deep" / "er" / "x.png")
    assert "5 written" in tool(folder, "--model_dir", constant)
    assert "1 written, 5 skipped" in tool(folder, "--model_dir", constant, "--recursive")
    assert "deep/er/x" in texts(folder)


def test_bad_pictures_are_left_out_and_listed(tool, folder, constant):
    whole = (folder / "0 é.png").read_bytes()
    (folder / "0 é.png").write_bytes(whole[: len(whole) // 2])
    (folder / "x.jpg").write_bytes(b"")
    out = tool(folder, "--model_dir", constant, "--batch_size", 3)
    assert f"4 written, 0 skipped, 2 failed ({folder / '0 é.png'}, {folder / 'x.jpg'})" in out
    assert len(texts(folder)) == 4


def test_only_bad_pictures_are_an_error(mistake, tmp_path, constant):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    assert "no tags are written" in mistake(tmp_path / "bad", "--model_dir", constant)
    assert "no tags are written" in mistake(
        tmp_path / "bad", "--model_dir", constant, "--output_path", tmp_path / "x.json"
    )


def test_force_replaces_and_append_adds(tool, folder, constant):
    file = folder / "0 é.txt"
    file.write_text("mine, long hair")
    words = (folder, "--model_dir", constant)
    assert "4 written, 1 skipped" in tool(*words)
    assert file.read_text() == "mine, long hair"
    assert "1 written, 4 skipped" in tool(*words, "--append_tags")
    assert file.read_text() == "mine, long hair, 1girl, miku_(vocaloid)\n"
    before = file.stat().st_mtime_ns
    assert "0 written, 5 skipped" in tool(*words, "--append_tags")
    assert file.stat().st_mtime_ns == before
    assert "5 written" in tool(*words, "--force")
    assert file.read_text() == "1girl, long_hair, miku_(vocaloid)\n"
    assert sorted(path.suffix for path in folder.iterdir()) == [".png"] * 5 + [".txt"] * 5  # and no journal


def test_tags_of_other_taggers_are_added_to(tool, folder, constant):
    (folder / "0 é.txt").write_text("1girl\nrating:safe\nsolo\n")
    (folder / "1 é.txt").write_bytes("rating:safe, café".encode("latin-1"))
    tool(folder, "--model_dir", constant, "--append_tags")
    found = texts(folder)
    assert found["0 é"] == "1girl\nrating:safe\nsolo\nlong_hair\nmiku_(vocaloid)"
    assert found["1 é"] == "rating:safe, café, 1girl, long_hair, miku_(vocaloid)"


def test_rules_reach_the_files(tool, folder, constant):
    words = "--remove_underscore --character_tag_expand --character_tags_first --use_rating_tags_as_last_tag"
    tool(folder, "--model_dir", constant, *words.split(), "--caption_separator", " | ")
    assert {*texts(folder).values()} == {"miku | vocaloid | 1girl | long hair | sensitive"}


def test_frequencies_count_what_was_there_before(tool, folder, constant):
    (folder / "0 é.txt").write_text("solo, 1girl, 1girl")
    out = tool(folder, "--model_dir", constant, "--frequency_tags")
    lines = [line.split() for line in out.splitlines() if line.startswith(" ")]
    assert lines == [["5", "1girl"], ["4", "long_hair"], ["4", "miku_(vocaloid)"], ["1", "solo"]]


def test_debug_shows_what_is_found(tool, folder, constant):
    out = tool(folder, "--model_dir", constant, "--debug")
    assert f"{folder / '0 é.png'}\n  rating: sensitive 0.70\n  general: 1girl 0.90, long_hair 0.40\n" in out
    assert out.count("  character: miku_(vocaloid) 0.50\n") == 5


def test_names_that_the_console_cannot_show(folder, constant):
    words = [folder, "--model_dir", constant, "--debug", "--frequency_tags"]
    ended = run([sys.executable, SCRIPT, *words], 60, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert "\\u7d75/0 \\xe9.png\n  rating: sensitive" in ended.stdout
    assert "      5  1girl\n" in ended.stdout


def test_metadata_keeps_what_is_in_it(tool, folder, constant, tmp_path):
    file = tmp_path / "meta cap.json"
    first, second = (os.fspath(folder / f"{number} é.png") for number in range(2))
    other = {"caption": "of another folder", "tags": "x"}
    there = {
        "/elsewhere/a.png": other,
        first: {"caption": "a cat", "train_resolution": [64, 64]},
        second: {"tags": "mine", "note": 1},
        "2 é": {"caption": "by name"},
    }
    file.write_text(json.dumps(there))
    words = (folder, "--model_dir", constant, "--output_path", file)
    assert "4 written, 1 skipped" in tool(*words)
    tags = {"tags": "1girl, long_hair, miku_(vocaloid)"}
    expected = {
        "/elsewhere/a.png": other,
        first: {"caption": "a cat", "train_resolution": [64, 64], **tags},
        second: {"tags": "mine", "note": 1},
        "2 é": {"caption": "by name", **tags},
        **{os.fspath(folder / f"{number} é.png"): tags for number in (3, 4)},
    }
    assert json.loads(file.read_text()) == expected
    assert not texts(folder)
    before = file.read_bytes()
    assert "0 written, 5 skipped" in tool(*words)
    assert file.read_bytes() == before
    assert "1 written, 4 skipped" in tool(*words, "--append_tags")
    expected[second]["tags"] = "mine, 1girl, long_hair, miku_(vocaloid)"
    assert json.loads(file.read_text()) == expected
    assert "5 written" in tool(*words, "--force")
    expected[second] |= tags
    assert json.loads(file.read_text()) == expected
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {file.name}


def test_a_line_of_json_per_picture(tool, folder, constant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tags.jsonl"
    file.write_text('{"image_path": "/elsewhere/a.png", "caption": "x", "more": 1}\n')
    words = (folder.name, "--model_dir", constant, "--output_path", file.name)
    assert "5 written" in tool(*words)
    caption = "1girl, long_hair, miku_(vocaloid)"
    ours = [{"image_path": os.fspath(folder / f"{number} é.png"), "caption": caption} for number in range(5)]
    other = {"image_path": "/elsewhere/a.png", "caption": "x", "more": 1}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [other, *ours]
    assert "0 written, 5 skipped" in tool(*words)
    assert "5 written" in tool(*words, "--force", "--thresh", 0.8)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [other, *({**line, "caption": "1girl"} for line in ours)]


# --- stopped and started again ---

DIES = """
    import os, runpy, signal, sys
    from library.preprocessing.tagging.results import Results
    sys.argv = {words!r}
    add, left = Results.add, [3]
    def then_die(self, picture, names):
        if not left[0]:
            os.kill(os.getpid(), signal.{signal})
        left[0] -= 1
        return add(self, picture, names)
    Results.add = then_die
    runpy.run_path({script!r}, run_name="__main__")
"""


def stopped(words: list[str], name: str) -> subprocess.CompletedProcess[str]:
    """The script, sent this signal at the fourth picture."""
    return python(DIES.format(words=[SCRIPT, *words], signal=name, script=os.fspath(ROOT / SCRIPT)))


@pytest.mark.parametrize(
    ("flags", "number"),
    [((), signal.SIGKILL), (("--force",), signal.SIGKILL), (("--append_tags",), signal.SIGINT)]
    + [(("--output_path", name), signal.SIGKILL) for name in ("tags.json", "tags.jsonl")]
    + [(("--force", "--output_path", "tags.json"), signal.SIGINT)],
)
def test_what_is_done_is_not_done_again(tool, folder, tagger, tmp_path, flags, number):
    def prepare() -> None:
        for path in folder.glob("*.png"):
            if flags in (("--append_tags",), ("--force",)):
                path.with_suffix(".txt").write_text("mine")
            else:
                path.with_suffix(".txt").unlink(missing_ok=True)
        for path in tmp_path.glob("tags.json*"):
            path.unlink()
        if flags[:2] == ("--force", "--output_path"):
            there = {os.fspath(path): {"tags": "mine"} for path in folder.glob("*.png")}
            (tmp_path / "tags.json").write_text(json.dumps(there))

    def outcome() -> dict[str, str]:
        return texts(folder) | {path.name: path.read_text() for path in tmp_path.glob("tags.json*")}

    own = [os.fspath(tmp_path / flag) if flag.startswith("tags") else flag for flag in flags]
    words = [os.fspath(folder), "--model_dir", os.fspath(tagger), "--batch_size", "4", *own]
    prepare()
    before = outcome()
    first = stopped(words, signal.Signals(number).name)
    assert first.returncode == (-number if number == signal.SIGKILL else 130), first.stderr
    assert ("interrupted: what is finished stays" in first.stderr) == (number == signal.SIGINT)
    if "--output_path" in flags:
        assert before.items() <= outcome().items()
    assert "2 written, 3 skipped" in tool(*words)
    found = outcome()
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name or path.suffix == ".tmp"]
    prepare()
    assert "5 written" in tool(*words)
    assert outcome() == found


def test_what_killed_processes_left_is_removed(tool, folder, constant, tmp_path):
    words = (folder, "--model_dir", constant)
    for name, flags in (("0 é.txt", ()), ("../x.json", ("--output_path", tmp_path / "x.json"))):
        left = folder / f"{name}.{2**22 + 1}.tmp"
        left.write_text("half")
        assert "5 written" in tool(*words, *flags)
        assert not left.exists()


@pytest.fixture
def half(folder, tagger, tmp_path) -> list[str]:
    """The words of a run for one file that was killed when it was done with three of five pictures."""
    words = [os.fspath(folder), "--model_dir", os.fspath(tagger), "--output_path", os.fspath(tmp_path / "x.json")]
    assert stopped(words, "SIGKILL").returncode == -signal.SIGKILL
    return words


def test_a_mistake_destroys_nothing_of_an_unfinished_run(tool, mistake, half, monkeypatch, tagger, capsys):
    folder, _, model, *output = half
    mistake(folder, "--model_dir", f"{model[:-2]}r", "--repo_id", "tager", *output)
    assert "x.json.unfinished has what a run with --thresh 0.35 did" in mistake(*half, "--thresh", 0.8)
    assert "with the tagger " in mistake(folder, "--model_dir", constant_tagger(tagger.parent / "other"), *output)
    monkeypatch.chdir(tagger.parent)
    assert "2 written, 3 skipped" in tool(folder, "--model_dir", tagger.name, *output, "--provider", "cpu")


def test_an_unfinished_run_for_another_folder_is_not_lost(tool, half, tmp_path):
    other = picture(tmp_path / "other" / "x.png")
    assert "1 written, 0 skipped" in tool(other.parent, *half[1:])
    assert len(json.loads((tmp_path / "x.json").read_text())) == 4
    assert "2 written, 3 skipped" in tool(*half)
    assert len(json.loads((tmp_path / "x.json").read_text())) == 6


def test_a_run_that_was_killed_at_its_very_end(tool, half, tmp_path):
    there = (tmp_path / "x.json.unfinished").read_bytes()
    tool(*half)
    (tmp_path / "x.json.unfinished").write_bytes(there)
    assert "0 written, 5 skipped" in tool(*half)
    assert not (tmp_path / "x.json.unfinished").exists()


@pytest.mark.parametrize("flag", ["--force", "--append_tags"])
def test_of_a_stopped_run_counts_what_is_still_there(tool, folder, constant, flag):
    words = [os.fspath(folder), "--model_dir", os.fspath(constant), flag]
    first = stopped(words, "SIGINT")
    assert "so far: 3 written, 0 skipped, 0 failed" in first.stdout
    tool(*words, "--caption_extension", ".wd")  # is another matter
    (folder / "0 é.txt").unlink()
    (folder / "1 é.txt").write_text("mine")
    assert "4 written, 1 skipped" in tool(*words)
    mine = "mine, " if flag == "--append_tags" else ""
    assert texts(folder)["1 é"] == f"{mine}1girl, long_hair, miku_(vocaloid)"
    assert len(texts(folder)) == 5
    assert not list(folder.glob(".tags*"))


# --- what is refused ---


def test_what_is_refused(mistake, folder, constant, tmp_path):
    good = (folder, "--model_dir", constant)
    assert "train_data_dir" in mistake("--model_dir", constant)
    assert f"did you mean {folder}?" in mistake(f"{folder}e")
    assert "--thresh: 35 is above 1" in mistake(*good, "--thresh", 35)
    assert "--thres: unknown option, did you mean --thresh?" in mistake(*good, "--thres", 0.3)
    assert "ends in neither .json nor .jsonl" in mistake(*good, "--output_path", tmp_path / "x.txt")
    assert "drop one of the two" in mistake(*good, "--force", "--append_tags")
    assert "--provider: this onnxruntime has no cudo" in mistake(*good, "--provider", "cudo", "--append_tags")
    (tmp_path / "x.json").write_text('{"a": ')
    assert "x.json: line 1: no valid JSON" in mistake(*good, "--output_path", tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text('{"image_path": "a", "caption": ""}\n{"caption": ""}\n')
    assert "x.jsonl: line 2: it should look like" in mistake(*good, "--output_path", tmp_path / "x.jsonl")
    assert "x.jsonl is a file and can hold no" in mistake(*good, "--output_path", tmp_path / "x.jsonl" / "y.json")


def test_models_that_are_refused(mistake, folder, constant):
    good = (folder, "--model_dir", constant)
    model = constant / "model.onnx"
    whole = model.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>"):
        model.write_bytes(damaged)
        assert "model.onnx: this model cannot be read, it is damaged or no ONNX model" in mistake(*good)
    (constant / "selected_tags.csv").unlink()
    assert f"--model_dir: {constant} holds model.onnx, but no selected_tags.csv" in mistake(*good)
