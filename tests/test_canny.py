"""tools/canny.py: which pixels are edges, and what becomes of a picture or a folder of them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library import cli
from library.preprocessing import edges as drawing
from library.preprocessing.edges import Thresholds, edges
from tests.pictures import picture
from tests.processes import run
from tools import canny

SCRIPT = "tools/canny.py"


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """`tool(words)`: the script in this process."""

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(canny.main, "the same command goes on")

    return call


@pytest.fixture
def source(tmp_path) -> Path:
    return tmp_path / "from"


@pytest.fixture
def said(tool, source, tmp_path, capsys):
    """`said(*flags)`: the last line about the edges of the source folder."""

    def call(*flags: object) -> str:
        tool("--input", source, "--output", tmp_path / "to", *flags)
        return capsys.readouterr().out

    return call


def square(brightness: int, path: Path | None = None) -> np.ndarray:
    """A grey square of 20 pixels in the middle of 40 black ones."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[10:30, 10:30] = brightness
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return image


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_the_outline_of_a_square():
    found = edges(square(255), Thresholds(32, 224))
    assert set(np.unique(found)) == {0, 255}
    y, x = np.nonzero(found)
    from_centre = np.maximum(abs(y - 19.5), abs(x - 19.5))
    assert from_centre.min() >= 9.5
    assert from_centre.max() <= 10.5
    assert 4 * 17 <= len(y) <= 4 * 21


def test_thresholds():
    """Sobel's operator answers a straight step with four times its height: 4 x 50 is between 32 and 224."""
    step = np.zeros((40, 40, 3), np.uint8)
    step[:, 20:] = 50
    assert not edges(step, Thresholds(32, 224)).any()
    assert edges(step, Thresholds(32, 190))[5:-5, 18:22].any(axis=1).all()
    assert np.array_equal(edges(step, Thresholds(190, 32)), edges(step, Thresholds(32, 190)))
    step[:20, 20:] = 100  # steep enough to begin an edge, which goes on below where it may be as weak as that
    assert edges(step, Thresholds(32, 224))[25:35, 18:22].any(axis=1).all()
    assert not edges(step, Thresholds(210, 224))[25:35, 18:22].any()


def test_colours_count_as_bright_as_they_look():
    image = np.zeros((40, 40, 3), np.uint8)
    for channel, found in ((0, True), (1, True), (2, False)):  # 4 x 255 x 0.299, 0.587 and 0.114
        image[:] = 0
        image[:, 20:, channel] = 255
        assert edges(image, Thresholds(32, 224)).any() == found


def test_one_picture_as_a_program_of_its_own(tmp_path):
    square(255, tmp_path / "a square.png")
    output = tmp_path / "der Rand ä" / "square.png"
    words = ["--input", tmp_path / "a square.png", "--output", output]
    done = run([sys.executable, SCRIPT, *words], 60)
    assert (done.returncode, done.stdout) == (0, "pictures of edges: 1 written, 0 skipped, 0 failed, on CPU\n")
    assert np.array_equal(pixels_of(output), edges(square(255), Thresholds(32, 224)))


def test_a_folder(said, source, tmp_path, capsys):
    square(255, source / "a.png")
    square(90, source / "b é.webp")
    square(255, source / "below" / "a.bmp")
    (source / "broken.jpg").write_bytes(b"no picture")
    failed = f"1 failed ({source / 'broken.jpg'}), on CPU\n"
    assert said() == f"pictures of edges: 2 written, 0 skipped, {failed}"
    assert said("--recursive") == f"pictures of edges: 1 written, 2 skipped, {failed}"
    assert said("--recursive", "--max_data_loader_n_workers", 1) == f"pictures of edges: 0 written, 3 skipped, {failed}"
    written = {path.relative_to(tmp_path / "to").as_posix() for path in (tmp_path / "to").rglob("*.*")}
    assert written == {"a.png", "b é.png", "below/a.png"}
    assert pixels_of(tmp_path / "to" / "below" / "a.png").any()


def test_transparent_parts_are_white(said, source, tmp_path):
    source.mkdir()
    image = np.zeros((40, 40, 4), np.uint8)
    image[:, 20:, 3] = 255
    Image.fromarray(image).save(source / "a.png")
    said()
    assert pixels_of(tmp_path / "to" / "a.png")[20, 18:22].any()


def test_what_is_done_again(said, source, tmp_path):
    square(50, source / "a.png")
    square(50, source / "b.png")
    said()
    kept = tmp_path / "to" / "b.png"
    kept.write_bytes(picture(tmp_path / "drawn.png").read_bytes())  # by hand, so that it tells of no thresholds
    drawn = kept.read_bytes()
    assert said("--thres2", 190).startswith("pictures of edges: 1 written, 1 skipped")
    assert pixels_of(tmp_path / "to" / "a.png").any()
    assert kept.read_bytes() == drawn
    assert said("--thres2", 190).startswith("pictures of edges: 0 written, 2 skipped")
    os.utime(source / "b.png", (2**31, 2**31))
    assert said("--thres2", 190).startswith("pictures of edges: 1 written, 1 skipped")
    assert said("--thres2", 190).startswith("pictures of edges: 0 written, 2 skipped")
    assert said("--thres2", 190, "--force").startswith("pictures of edges: 2 written, 0 skipped")


def test_pictures_of_one_stem_have_edges_of_their_own(said, source, tmp_path):
    square(255, source / "a.bmp")
    square(0, source / "a.png")
    assert said() == "pictures of edges: 2 written, 0 skipped, 0 failed, on CPU\n"
    assert pixels_of(tmp_path / "to" / "a.png").any()
    assert not pixels_of(tmp_path / "to" / "a.png.png").any()


def test_what_a_format_cannot_hold(tool, tmp_path, capsys):
    picture(tmp_path / "long.png", (17_000, 8))
    with pytest.raises(SystemExit, match="2"):
        tool("--input", tmp_path / "long.png", "--output", tmp_path / "edges.webp")
    assert "edges.webp would be 17000x8 pixels, and .webp holds 16383 a side" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["long.png"]


def test_a_picture_that_is_named_is_written_in_place_of_another_one(tool, tmp_path):
    square(255, tmp_path / "a.png")
    for name in ("edges.png", "edges.bmp"):
        picture(tmp_path / name)
        tool("--input", tmp_path / "a.png", "--output", tmp_path / name)
        assert np.array_equal(pixels_of(tmp_path / name), edges(square(255), Thresholds(32, 224)))


def test_forced_work_that_is_stopped_goes_on(said, source, tmp_path, monkeypatch, capsys):
    for number in range(5):
        square(255, source / f"{number}.png")
    said()

    def stopped(target: Path, *rest: object) -> None:
        if target.name >= "3.png":
            raise KeyboardInterrupt
        save(target, *rest)

    save = drawing.save_picture
    monkeypatch.setattr(drawing, "save_picture", stopped)
    with pytest.raises(SystemExit, match="130"):
        said("--force", "--max_data_loader_n_workers", 1)
    assert capsys.readouterr().out == "so far: 3 written, 0 skipped, 0 failed\n"
    monkeypatch.setattr(drawing, "save_picture", save)
    assert said("--force") == "pictures of edges: 2 written, 3 skipped, 0 failed, on CPU\n"
    (tmp_path / "to" / ".canny.unfinished").touch()
    said()
    assert not list((tmp_path / "to").glob(".*"))


def test_mistakes(mistake, source, tmp_path):
    file, other, to = source / "a.png", source / "aa.png", tmp_path / "to"
    square(255, file)
    assert "--input: no picture is given" in mistake("--output", to)
    assert "--output: what to write is not named" in mistake("--input", file)
    assert f"{other} does not exist, did you mean {file}?" in mistake("--input", other, "--output", to)
    assert "e.png would be a folder" in mistake("--input", source, "--output", tmp_path / "e.png")
    assert f"form does not exist, did you mean {source}?" in mistake("--input", tmp_path / "form", "--output", to)
    assert "ends in none of .png, .jpg" in mistake("--input", file, "--output", to)
    assert "is a folder, give the name of a picture in it" in mistake("--input", file, "--output", source.parent)
    assert f"lies in {source}, which is read" in mistake("--input", source, "--output", source / "edges")
    square(255, source / "below" / "below" / "a.png")
    below = ["--input", source / "below", "--output", source]
    assert f"{source} holds {source / 'below'}, which is read" in mistake(*below, "--recursive")
    assert "is one of the files to read" in mistake("--input", file, "--output", file)
    assert "--thres1: -1 is too small" in mistake("--input", file, "--output", to, "--thres1=-1")
    assert "did you mean --thres1 or --thres2?" in mistake("--input", file, "--output", to, "--thres", 5)
