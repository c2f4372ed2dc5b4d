"""Which picture a key of a metadata file means, and files of metadata that are read and written entry by entry."""

import json
import os
from pathlib import Path

import pytest

from library.data.scanning import members
from library.data.scanning.members import read_members, write_members
from library.errors import UserError
from library.preprocessing.metadata.file import MetadataFile
from library.preprocessing.metadata.keys import Keys

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a", "a.png"),
        ("a.png", "a.png"),
        ("a.webp", None),
        ("b.c", "b.c.jpg"),
        ("b", None),
        ("both", "both.jpg"),
        ("both.png", "both.png"),
        ("nest.png", "nest.png"),  # and not nest.png.jpg, whose stem it is
        ("nest.png.jpg", "nest.png.jpg"),
        (COMPOSED, f"{DECOMPOSED}.png"),
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png"),
        ("folder/a", None),
        ("", None),
    ],
)
def test_the_picture_of_a_name(key, name):
    names = ["a.png", "b.c.jpg", "both.jpg", "both.png", f"{DECOMPOSED}.png", "nest.png", "nest.png.jpg"]
    pictures = [Path("data", each) for each in names]
    keys = Keys(pictures, full_path=False)
    assert keys.picture(key) == (name and Path("data", name))
    assert keys.sharing == [Path("data", "both.png")]


def test_the_picture_of_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = [Path("data", "a.png"), Path("data", "deeper", "a.jpg")]
    keys = Keys(pictures, full_path=True)
    for key in (tmp_path / "data" / "a.png", tmp_path / "data" / "a", "data/a", "./data/../data/a.png"):
        assert keys.picture(str(key)) == pictures[0]
    assert keys.picture(str(tmp_path / "data" / "deeper" / "a")) == pictures[1]
    assert keys.picture("a") is keys.picture(str(tmp_path / "other" / "a.png")) is None
    assert [keys.new(picture) for picture in pictures] == [os.path.abspath(picture) for picture in pictures]
    assert not keys.sharing
    assert keys.has_folder_of("data/gone.png")
    assert not keys.has_folder_of(str(tmp_path / "other" / "a.png")), "it may well be there"


def test_what_is_written_is_what_was_read(tmp_path, monkeypatch):
    """Also what no text can hold, and where the pieces that are read end anywhere."""
    path = tmp_path / "meta.json"
    entries = {
        'ünï \u2028 \\ "': {"caption": "two\nlines \U0001f600", "train_resolution": [512, 768], "nothing": None},
        "\udcff.png": {"tags": "\ud83d", "deep": {"a": [1.5, {"b": True}]}},
        "empty": {},
    }
    write_members(path, entries.items())
    assert json.loads(path.read_text(encoding="utf-8")) == entries
    for piece in (1, 7, 2**20):
        monkeypatch.setattr(members, "_PIECE", piece)
        assert dict(read_members(path)) == entries
    write_members(path, ())
    assert dict(read_members(path)) == {}


@pytest.mark.parametrize(
    ("text", "line"), [('{"a": {}}\n{"b": {}}', 2), ("{}]", 1), ('{"a": {}', 1), ('{"a": {},\n}', 2), ("", 1)]
)
def test_files_that_hold_more_or_less_than_one_object_are_refused(text, line, tmp_path):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=f"meta.json: line {line}: no valid JSON"):
        list(read_members(tmp_path / "meta.json"))


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000, "1e400", "-Infinity", "NaN"])
def test_values_that_no_other_program_could_read_are_refused(value, tmp_path):
    (tmp_path / "meta.json").write_text(f'{{"a": {{}},\n"b": {{"n": {value}}}}}')
    with pytest.raises(UserError, match=r"meta.json: line 2: no valid JSON"):
        list(read_members(tmp_path / "meta.json"))


def test_of_several_entries_of_one_name_the_last_counts(tmp_path, capsys, fresh_console):
    path = tmp_path / "meta.json"
    path.write_text('{"a": {"n": 1}, "b": {"n": 2}, "a": {"n": 3}, "c": {"n": 4}, "a": {"n": 5}}')
    file = MetadataFile(path)
    assert list(file) == list(file) == [("b", {"n": 2}), ("c", {"n": 4}), ("a", {"n": 5})]
    assert (len(file), "a" in file, "d" in file) == (3, True, False)
    assert "1 name is there more than once, and the last entry of each counts: a" in capsys.readouterr().err
