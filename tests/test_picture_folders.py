"""Which pictures a tool works on, in what order, and which text files are theirs."""

import os
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from library.errors import UserError
from library.preprocessing.pictures import clean_up_beside, find_pictures, text_file, with_dot, with_files_of_their_own

ANY_NAME = pytest.mark.skipif(sys.platform != "linux", reason="this system's file names are text")
pytestmark = pytest.mark.usefixtures("fresh_console")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *, recursive: bool = False) -> list[str]:
    paths = find_pictures("train_data_dir", folder, recursive=recursive)
    return [path.relative_to(folder).as_posix() for path in paths]


def test_pictures_and_nothing_else(tmp_path):
    fill(tmp_path, "b c.png", "a.JPG", "Z.webp", "ä.bmp", "a.txt", "png", ".hidden.png", "sub.png/x.png", ".sub/y.png")
    assert found(tmp_path) == ["Z.webp", "a.JPG", "b c.png", "ä.bmp"]
    assert found(tmp_path, recursive=True) == ["Z.webp", "a.JPG", "b c.png", "sub.png/x.png", "ä.bmp"]


def test_order_is_that_of_other_systems(tmp_path):
    """However accents are composed, and whatever separates folders."""
    composed = ["a-b.png", "a/c.png", "a b/c.png", "e.png", "ea.png", "é.png", "éa.png", "ガ.png", "キ.png"]
    decomposed = [unicodedata.normalize("NFD", name) for name in composed]
    assert composed != decomposed
    orders = []
    for place, names in (("composed", composed), ("decomposed", decomposed)):
        fill(tmp_path / place, *names)
        orders.append([unicodedata.normalize("NFC", name) for name in found(tmp_path / place, recursive=True)])
    assert orders[0] == orders[1]
    assert orders[0][:3] == ["a/c.png", "a b/c.png", "a-b.png"]


@ANY_NAME
def test_names_that_look_the_same_keep_an_order(tmp_path):
    names = ["é.png", unicodedata.normalize("NFD", "é.png")]
    for place, order in (("first", names), ("second", names[::-1])):
        fill(tmp_path / place, *order)
        assert found(tmp_path / place) == [names[1], names[0]]


@ANY_NAME
def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    fill(tmp_path, name, "a.png")
    assert found(tmp_path) == ["a.png", name]
    assert text_file(tmp_path / name, ".txt") == tmp_path / os.fsdecode(b"\xff\xfe.txt")


def test_paths_begin_as_the_folder_was_given(tmp_path, monkeypatch):
    fill(tmp_path / "train data", "a.png")
    monkeypatch.chdir(tmp_path)
    assert find_pictures("train_data_dir", Path("train data")) == [Path("train data/a.png")]


def test_folders_behind_links_are_gone_through_once(tmp_path):
    folder = tmp_path / "train"
    fill(folder, "m/a.png", "m/n/b.png")
    fill(tmp_path, "elsewhere/c.png", "elsewhere/deep/d.png")
    for link, target in (("a link", "m"), ("m/up", "."), ("other", "../elsewhere"), ("other too", "../elsewhere")):
        (folder / link).symlink_to((folder / target).resolve(), target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    expected = ["gone.png", "m/a.png", "m/n/b.png", "other/c.png", "other/deep/d.png"]
    assert found(folder, recursive=True) == expected
    assert found(folder) == ["gone.png"]


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    fill(tmp_path / "real", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert found(tmp_path / "link") == ["a.png"]


def test_a_folder_below_that_cannot_be_read_is_said(tmp_path, monkeypatch, capsys):
    fill(tmp_path, "a.png", "closed/b.png", "open/c.png")
    scandir = os.scandir

    def scan(place):
        if os.fspath(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scan)
    assert found(tmp_path, recursive=True) == ["a.png", "open/c.png"]
    assert f"{tmp_path / 'closed'}: this folder cannot be read and is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("trian", "train_data_dir: the folder .*trian does not exist, did you mean .*train?"),
        ("train/a.png", "is a file, not a folder"),
        ("empty", r"there are no pictures in .*empty: .*\.jpg, .* are taken$"),
        ("deep", "there are no pictures in .*deep, but in those below it: add --recursive"),
    ],
)
def test_folders_without_pictures_are_refused(tmp_path, name, sentence):
    fill(tmp_path, "train/a.png", "empty/a.txt", "deep/er/a.png")
    with pytest.raises(UserError, match=sentence):
        found(tmp_path / name)


def test_a_hundred_thousand_pictures(tmp_path, monkeypatch):
    """Made up, since making files takes longer than finding them."""
    names = [f"{number:06d} é.png" for number in range(100_000)]
    monkeypatch.setattr(os, "walk", lambda folder, **_: [(os.fspath(folder), [], list(reversed(names)))])
    start = time.monotonic()
    paths = with_files_of_their_own(find_pictures("train_data_dir", tmp_path, recursive=True), ".txt")
    assert [path.name for path in paths] == names
    assert time.monotonic() - start < 15


def test_of_two_pictures_with_one_text_file_the_first_has_it(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.jpg", "a.png", "a.b.png", "b/a.png")]
    assert with_files_of_their_own(paths, ".txt") == [paths[0], *paths[2:]]
    assert "and so the same .txt file: a.png\n" in capsys.readouterr().err


def test_what_killed_runs_left_of_text_files_goes(tmp_path):
    ours = ("sub/a.txt.4194300.tmp",)
    others = ("sub/a.png", "sub/a.txt", "sub/b.caption.4194300.tmp", "sub/notes.tmp", f"sub/c.txt.{os.getppid()}.tmp")
    fill(tmp_path, *ours, *others)
    clean_up_beside([tmp_path / "sub" / "a.png"], ".txt")
    assert sorted(f"sub/{path.name}" for path in (tmp_path / "sub").iterdir()) == sorted(others)


def test_endings_of_text_files():
    assert [with_dot(extension) for extension in ("txt", ".txt", ".wd.txt", "_tags.txt")] == [
        ".txt",
        ".txt",
        ".wd.txt",
        "_tags.txt",
    ]
    for extension in ("", ".", "sub/.txt", "png", ".JPEG", "_x.webp"):
        with pytest.raises(UserError, match="--caption_extension: "):
            with_dot(extension)
