"""The comparison of the methods: its commands, its judgement, its page, and the whole of it for real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import learning
from examples.learning import ASKED, LOST, PLAIN, WITH_PRIOR, Result, methods, shortcomings

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
FOLDER = Path("output/learning")
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.search(r"\| \d of \d", line)]


def results(**changes: dict[str, float]) -> list[Result]:
    """Of the miniature and of all methods, as good as they should be; changes by the name of a method."""
    base = Result("", 0.08, 0.03, 0.03, 0, ASKED, [])
    found = [base, base]
    for method in methods(FOLDER):
        good = base._replace(title=method.title, hearts=0.99 * (1 - method.gain) * base.hearts)
        if method.title == PLAIN:
            good = good._replace(circles=0.06, right_circles=LOST)
        found.append(good._replace(**changes.get(method.name, {})))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learning")
    learning.draw_all(folder)
    return folder


@pytest.mark.parametrize("name", [method.name for method in methods(FOLDER)])
def test_its_commands_could_run(name, data, train, capsys):
    (method,) = (method for method in methods(data) if method.name == name)
    command = learning.training_command(method, data)
    script = next(number for number, word in enumerate(command) if word.endswith(method.script))
    train([*command[script + 1 :], "--dry_run"], script=Path(method.script).stem)
    said = capsys.readouterr()
    assert f"{method.name}.safetensors" in said.out
    assert "no effect" not in said.err


def test_what_falls_short_is_named():
    assert not shortcomings(results(), methods(FOLDER))
    for method in methods(FOLDER):
        found = shortcomings(results(**{method.name: {"hearts": 0.081}}), methods(FOLDER))
        assert found == [f"{method.title} learned too little"]
    nothing_learned = {"hearts": float("nan")}
    assert shortcomings(results(lora=nothing_learned), methods(FOLDER)) == ["LoRA learned too little"]


def test_what_was_forgotten_is_named():
    for forgot in ({"right_circles": 9}, {"circles": 0.053}, {"circles": float("nan")}):
        found = shortcomings(results(dreambooth_with_prior_images=forgot), methods(FOLDER))
        assert found == [f"{WITH_PRIOR} forgot too much"]
    as_good = shortcomings(results(dreambooth={"right_circles": LOST + 1}), methods(FOLDER))
    assert as_good == [f"{PLAIN} forgot nothing that prior images could keep"]


def test_the_page_shows_the_dataset_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert learning.preserving(FOLDER).strip() in PAGE.replace("\\", "/")


def test_the_page_shows_every_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = set(re.findall(r"[^\s\\`]+", PAGE))
    for method in methods(FOLDER):
        command = learning.training_command(method, FOLDER)
        assert {Path(word).as_posix() if "/" in word else word for word in command} <= shown, method.title


def test_the_figures_of_the_page_are_as_they_should_be():
    own, by_word, *others = [
        Result(row[0].strip(), float(row[1]), float(row[4]), float(row[6]), _first(row[3]), _first(row[5]), [])
        for row in ROWS
    ]
    assert [result.title for result in others] == [method.title for method in methods(FOLDER)]
    assert not shortcomings([own, by_word, *others], methods(FOLDER))


def _first(cell: str) -> int:
    """How many, of `4 of 6`."""
    return int(cell.split()[0])


def test_the_pictures_of_the_page_are_small():
    assert (ROOT / "docs" / "learning.png").stat().st_size < 400_000


@pytest.mark.slow
def test_every_method_learns(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "learning.py"), "--output_dir", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not ended.returncode, ended.stderr[-2000:]
    table = (tmp_path / "out" / "learning.md").read_text()
    assert table in ended.stdout
    assert all(f"| {method.title} |" in table for method in methods(FOLDER))
    assert (tmp_path / "out" / "learning.png").stat().st_size < 400_000
