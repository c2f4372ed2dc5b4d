"""Captions that are made in place of others, by a run that is stopped and started again; a function stands in for the
model.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from library.options.make_captions import MakeCaptionsOptions
from library.preprocessing.captioning.folder import find_work, make_captions
from library.preprocessing.tally import Tally
from tests.pictures import picture

pytestmark = pytest.mark.usefixtures("fresh_console")


class StandIn:
    """A captioner that says what a function makes of a picture's name."""

    def __init__(self, answer: Callable[[str], str]):
        self.answer = answer

    def reader(self, pixels: object) -> object:
        return pixels

    def caption(self, choice: None, names: list[str], inputs: list[object]) -> list[str]:
        return [self.answer(name) for name in names]


@pytest.fixture
def data(tmp_path) -> Path:
    """Seven pictures with captions that are old."""
    for number in range(7):
        picture(tmp_path / "my data" / f"{number} ü.png", (20, 30)).with_suffix(".caption").write_text("old\n")
    return tmp_path / "my data"


def run(data: Path, answer: str | Callable[[str], str], **flags: object) -> Tally:
    """Caption all pictures again."""
    options = MakeCaptionsOptions(train_data_dir=data, **flags)
    work = find_work(options, force=True)
    make_captions(work, StandIn(answer if callable(answer) else lambda name: answer), None, options, 2)
    return work.tally


def stop(data: Path, name: str, **flags: object) -> None:
    """Caption them again as `new`, until one has this in its name."""

    def answer(of: str) -> str:
        if name in of:
            raise KeyboardInterrupt
        return "new"

    with pytest.raises(KeyboardInterrupt):
        run(data, answer, **flags)


def captions(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder.rglob("*.caption"))]


def test_goes_on_from_where_it_was_stopped(data, capsys):
    stop(data, "4")
    assert "so far: 4 written, 0 skipped, 0 failed" in capsys.readouterr().out
    assert captions(data) == ["new"] * 4 + ["old"] * 3
    tally = run(data, "newer", batch_size=2)
    assert (tally.written, tally.skipped) == (3, 4)
    assert captions(data) == ["new"] * 4 + ["newer"] * 3
    assert "captions: 4 are done by a run that was stopped" in capsys.readouterr().err
    assert run(data, "newest").written == 7
    assert {path.suffix for path in data.iterdir()} == {".png", ".caption"}


def test_only_what_is_still_there_counts(data):
    stop(data, "6")
    (data / "1 ü.caption").unlink()
    (data / "2 ü.caption").write_text("my own")
    picture(data / "3 ü.png", (30, 30))
    tally = run(data, "newer")
    assert (tally.written, tally.skipped) == (4, 3)
    assert captions(data) == ["new", *["newer"] * 3, "new", "new", "newer"]


def test_what_another_run_was_to_make_is_made_anew(data):
    stop(data, "4")
    assert run(data, "newer", seed=7).written == 7


def test_what_is_another_run(data, tmp_path, monkeypatch):
    """Not how a folder is written, nor what computes; another ending is one beside it."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    stop(data, "6", model_id="model")
    stop(data, "2", model_id="model", caption_extension=".txt")
    assert run(Path("my data"), "newer", model_id=str(tmp_path / "model"), device="cpu", batch_size=3).skipped == 6
    assert run(data, "newer", model_id="./model", caption_extension="txt").skipped == 2


def test_pictures_whose_names_look_the_same_are_two(data):
    for name in ("é.png", "e\u0301.png"):
        picture(data / name, (20, 20))
    if len(list(data.glob("*.png"))) < 9:
        pytest.skip("this disk takes them for one")
    stop(data, "\u00e9")
    assert run(data, "newer").written == 2
    stop_at_second = iter(("new", None))

    def answer(name: str) -> str:
        if "\u00e9" in name and next(stop_at_second) is None:
            raise KeyboardInterrupt
        return "new"

    with pytest.raises(KeyboardInterrupt):
        run(data, answer)
    assert run(data, "newer").written == 1
