"""The index kept beside the data: it spares reading, and never hides a change."""

import os

import numpy as np
import pytest

from library.data.records import scan
from library.data.scanning import sources
from library.data.scanning.index import index_path
from tests.pictures import dataset, picture, subset


@pytest.fixture
def opened(monkeypatch):
    """Names of the image and caption files that were read."""
    names = []

    def noting(read):
        def noted(path, **options):
            names.append(os.path.basename(path))
            return read(path, **options)

        return noted

    for name in ("read_header", "read_caption"):
        monkeypatch.setattr(sources, name, noting(getattr(sources, name)))
    return names


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        picture(tmp_path / f"{number}.png", (40 + number, 50), f"caption {number}")
    picture(tmp_path / "bare.png")
    return tmp_path


def facts(folder, **options):
    table = scan([dataset(subset(folder, cache_info=True, class_tokens="dog", **options))])
    return [(r.path, r.caption, r.width, r.height, r.bucket) for r in table]


def test_a_second_start_reads_nothing(folder, opened):
    first = facts(folder)
    assert len(opened) == 11
    opened.clear()
    assert facts(folder) == first
    assert opened == []
    assert facts(folder, num_repeats=2) == first


def test_an_index_that_still_holds_is_not_written_again(folder, monkeypatch):
    (folder / "broken.png").touch()
    facts(folder)
    written = []
    monkeypatch.setattr("library.data.scanning.index.write_arrays", lambda path, arrays: written.append(path))
    facts(folder)
    assert written == []
    (folder / "4.png").unlink()
    facts(folder)
    assert written == [index_path(folder, ".caption")]


def test_changes_are_read_again_and_only_they(folder, opened):
    facts(folder)
    opened.clear()
    picture(folder / "1.png", (99, 50))
    (folder / "2.caption").write_text("another")
    (folder / "bare.caption").write_text("now one")
    (folder / "3.caption").unlink()
    (folder / "4.png").unlink()
    picture(folder / "new.png", (70, 50), "new")
    assert [(caption, width) for _, caption, width, _, _ in facts(folder)] == [
        ("caption 0", 40),
        ("caption 1", 99),
        ("another", 42),
        ("dog", 43),
        ("now one", 64),
        ("new", 70),
    ]
    assert {os.path.splitext(name)[0] for name in opened} == {"1", "2", "3", "bare", "new"}
    opened.clear()
    facts(folder)
    assert opened == []


def test_the_same_size_at_another_time_is_a_change(folder):
    facts(folder)
    (folder / "2.caption").write_text("CAPTION 2")
    os.utime(folder / "2.caption", ns=(1, 1))
    assert facts(folder)[2][1] == "CAPTION 2"


def test_broken_images_are_reported_each_time(folder, monkeypatch):
    (folder / "0.png").write_bytes(b"")
    said = []
    monkeypatch.setattr("library.data.scanning.sources.warn", said.append)
    for _ in range(2):
        assert len(facts(folder)) == 5
    assert len([message for message in said if "0.png (the file is empty)" in message]) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "other version", "inconsistent", "foreign"])
def test_a_damaged_or_foreign_index_is_ignored_and_made_anew(folder, opened, damage):
    first = facts(folder)
    path = index_path(folder, ".caption")
    arrays = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("hello")
    else:
        change = {
            "other version": {"made_by": np.array([0, 0])},
            "inconsistent": {"sizes": arrays["sizes"][1:]},
            "foreign": {"caption_lengths": arrays["caption_lengths"] + 1},
        }[damage]
        np.savez(path, **(arrays | change))
    opened.clear()
    assert facts(folder) == first
    assert len(opened) == 11
    opened.clear()
    assert facts(folder) == first
    assert opened == []


def test_an_index_is_for_one_extension_and_one_way_to_decode(folder):
    facts(folder)
    picture(folder / "0.png", (40, 50), "other", extension=".txt")
    assert facts(folder, caption_extension=".txt")[0][1] == "other"
    assert facts(folder)[0][1] == "caption 0"


def test_a_folder_that_takes_no_index_is_said_once_and_used(folder, monkeypatch):
    said = []
    monkeypatch.setattr("library.data.scanning.index.warn", said.append)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("library.data.scanning.index.write_arrays", refuse)
    assert len(facts(folder)) == 6
    (message,) = said
    assert str(index_path(folder, ".caption")) in message


def test_without_cache_info_nothing_is_written(folder):
    before = set(folder.iterdir())
    scan([dataset(subset(folder, class_tokens="dog"))])
    assert set(folder.iterdir()) == before
