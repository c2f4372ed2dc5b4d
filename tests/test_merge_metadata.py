"""The scripts that merge captions and tags into metadata files."""

import json
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import merge_captions_to_metadata, merge_dd_tags_to_metadata
from library import cli
from library.data.scanning import reading
from library.data.scanning.listing import list_folder
from library.data.scanning.reading import Caption
from library.preprocessing.metadata import merging
from library.preprocessing.pictures import find_pictures
from tests.processes import run
from tests.test_options import OTHERWISE, alike, flags_of, table

CAPTIONS = "finetune/merge_captions_to_metadata.py"
TAGS = "finetune/merge_dd_tags_to_metadata.py"
MAINS = {CAPTIONS: merge_captions_to_metadata.main, TAGS: merge_dd_tags_to_metadata.main}


@pytest.fixture
def merge(monkeypatch, fresh_console, tmp_path, capsys) -> Callable[..., str]:
    """`merge(script, *words)` in this process and in `tmp_path`: what it prints."""

    def call(script: str, *words: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        cli.run(MAINS[script])
        said = capsys.readouterr()
        return said.out + said.err

    return call


@pytest.fixture
def tool(merge) -> Callable[..., None]:
    """The script that merges captions; what is checked first is the same for tags."""
    return lambda *words: print(merge(CAPTIONS, *words))


def fill(folder: Path, texts: dict[str, str | bytes | None], extension: str = ".caption") -> Path:
    """Pictures by name, whose contents no one reads, with text files where there is a text."""
    for name, text in texts.items():
        picture = folder / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.touch()
        if text is not None:
            data = text if isinstance(text, bytes) else text.encode()
            picture.with_suffix(extension).write_bytes(data)
    return folder


def as_in_tables(row: dict[str, str]) -> dict[str, str]:
    """A row of `flags_of` in the tables' words."""
    return alike(row | {"type": row["type"].replace("Path", "str"), "required": "yes" if row["required"] else ""})


def read(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", MAINS)
def test_flags_are_those_of_the_table(script):
    name = script.removesuffix(".py")
    rows, ours = table(name.replace("/", "__")), flags_of(name.replace("/", "."))
    expected = {flag: alike(row | OTHERWISE.get(flag, {})) for flag, row in rows.items()}
    there = {flag: as_in_tables(row) for flag, row in ours.items()}
    assert there.pop("--force")
    assert there == expected


def test_captions_then_tags_as_programs_of_their_own(tmp_path):
    folder = fill(tmp_path / "train data ü", {"b c.png": "a woman\n", "ünï.JPG": "first \n\n second ", "d.webp": None})
    fill(folder, {"b c.png": "1girl, solo,\nlong_hair\n\nrating:safe\n", "ünï.JPG": "", "d.webp": "tree"}, ".txt")
    os.chmod(folder, 0o555)
    captions, tags = tmp_path / "meta_cap.json", tmp_path / "new" / "meta_cap_dd.json"
    done = run([sys.executable, CAPTIONS, folder, captions], 60)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "1 of the 3 pictures" in done.stderr  # d has only tags
    assert done.stdout.splitlines()[0] == "captions: 2 written, 0 skipped, 0 failed"
    assert "2 entries: 2 new" in done.stdout
    assert "1 picture has no .caption file" in done.stdout
    assert read(captions) == {"b c": {"caption": "a woman"}, "ünï": {"caption": "first\nsecond"}}
    done = run([sys.executable, TAGS, folder, "--in_json", captions, tags], 60)
    assert (done.returncode, "1 file is empty and left out" in done.stderr) == (0, True)
    assert list(read(tags).items()) == [
        ("b c", {"caption": "a woman", "tags": "1girl, solo, long_hair, rating:safe"}),
        ("ünï", {"caption": "first\nsecond"}),
        ("d", {"tags": "tree"}),
    ]


def test_entries_are_updated_where_they_are_and_nothing_else_is_touched(merge, tmp_path):
    fill(tmp_path / "data", {f"{name}.png": f"new {name}" for name in "abcd"})
    old = {
        "elsewhere": {"caption": "kept", "x": [1]},
        "c": {"tags": "t", "caption": "old c", "train_resolution": [64, 128]},
        "a.png": {"other": {"deep": None}},
        "d": {"caption": "new d"},
    }
    (tmp_path / "in.json").write_text(json.dumps(old))
    before = (tmp_path / "in.json").read_bytes()
    said = merge(CAPTIONS, "data", "out.json", "--in_json", "in.json", "--debug")
    expected = {
        "elsewhere": old["elsewhere"],
        "c": old["c"] | {"caption": "new c"},
        "a.png": old["a.png"] | {"caption": "new a"},
        "d": old["d"],
        "b": {"caption": "new b"},
    }
    assert list(read(tmp_path / "out.json").items()) == list(expected.items())
    assert (tmp_path / "in.json").read_bytes() == before
    assert "captions: 3 written, 1 skipped, 0 failed" in said
    assert "5 entries: 1 new, 1 with another caption than before, 1 that had none, 2 as they were" in said
    assert "'c': 'new c' in place of 'old c'\n" in said
    assert "'b': 'new b'\n" in said


def test_an_existing_output_is_merged_into_when_no_input_is_named(merge, tmp_path):
    fill(tmp_path / "data", {"a.png": "text"})
    (tmp_path / "meta.json").write_text('{"z": {"tags": "kept"}}')
    assert "meta.json exists, and its entries are kept" in merge(CAPTIONS, "data", "meta.json")
    first = read(tmp_path / "meta.json")
    assert first == {"z": {"tags": "kept"}, "a": {"caption": "text"}}
    said = merge(CAPTIONS, "data", "meta.json", "--in_json", "meta.json")
    assert read(tmp_path / "meta.json") == first
    assert "0 written, 1 skipped" in said
    (tmp_path / "empty.json").write_text("{}")
    said = merge(CAPTIONS, "data", "meta.json", "--in_json", "empty.json")
    assert read(tmp_path / "meta.json") == {"a": {"caption": "text"}}
    assert "meta.json is made anew from empty.json, and 1 entry is not there and is lost: z" in said


def test_several_folders_by_paths(merge, tmp_path):
    one = fill(tmp_path / "one", {"a.png": "one a", "deeper/a.png": "deeper a", ".hidden/h.png": "h"})
    fill(tmp_path / "two", {"a.png": "two a"})
    merge(CAPTIONS, "--full_path", "--recursive", "one", "meta_cap1.json")
    merge(CAPTIONS, "--full_path", "--in_json", "meta_cap1.json", tmp_path / "two", "meta_cap2.json")
    assert read(tmp_path / "meta_cap2.json") == {
        str(one / "a.png"): {"caption": "one a"},
        str(one / "deeper" / "a.png"): {"caption": "deeper a"},
        str(tmp_path / "two" / "a.png"): {"caption": "two a"},
    }
    said = merge(CAPTIONS, "two", "mixed.json", "--in_json", "meta_cap2.json")
    assert len(read(tmp_path / "mixed.json")) == 4
    assert re.search("3 of the 3 entries name a picture with its folder, .* two entries .* add --full_path", said)
    said = merge(CAPTIONS, "--full_path", "two", "mixed2.json", "--in_json", "mixed.json")
    assert re.search("1 of the 4 entries name a picture without a folder.* leave --full_path out: a", said)


def test_pictures_that_differ_only_in_their_endings(merge, tmp_path):
    """Each has an entry, of the name by which fine-tuning finds it."""
    fill(tmp_path / "data", {"a.jpg": "text", "a.png": "text", "n.png": "n", "n.png.jpg": "its own"})
    said = merge(CAPTIONS, "data", "stems.json")
    assert "1 picture has the name of another one but for the ending, and its text, too: data/a.png" in said
    texts = {"a": "text", "a.png": "text", "n": "n", "n.png.jpg": "its own"}
    assert read(tmp_path / "stems.json") == {key: {"caption": text} for key, text in texts.items()}
    listing = list_folder(tmp_path / "data")
    assert sorted(map(listing.find, texts)) == listing.images
    assert "0 written, 4 skipped" in merge(CAPTIONS, "data", "stems.json")
    for name in ("n.png", "n.png.jpg"):
        (tmp_path / "data" / name).unlink()
    merge(CAPTIONS, "data", "paths.json", "--full_path")
    assert read(tmp_path / "paths.json") == {
        str(tmp_path / "data" / name): {"caption": "text"} for name in ("a.jpg", "a.png")
    }


def test_an_empty_text_takes_the_place_of_none(merge, tmp_path):
    fill(tmp_path / "data", {"a.png": " \n", "b.png": "text", "c.png": ""})
    (tmp_path / "meta.json").write_text('{"a": {"caption": "precious"}}')
    said = merge(CAPTIONS, "data", "meta.json")
    assert read(tmp_path / "meta.json") == {"a": {"caption": "precious"}, "b": {"caption": "text"}}
    assert "2 files are empty and left out: data/a.caption, data/c.caption" in said
    (tmp_path / "data" / "b.caption").write_text("")
    with pytest.raises(SystemExit, match="2"):
        merge(CAPTIONS, "data", "none.json")
    assert not (tmp_path / "none.json").exists()


def test_links_to_folders_are_followed_as_by_the_other_tools(merge, tmp_path):
    fill(tmp_path / "ext", {"deep/b.png": "b"})
    folder = fill(tmp_path / "data", {"a.png": "a"})
    (folder / "link").symlink_to(tmp_path / "ext")
    (folder / "loop").symlink_to(folder)
    merge(CAPTIONS, "data", "meta.json", "--full_path", "--recursive")
    pictures = find_pictures("", folder, recursive=True)
    assert read(tmp_path / "meta.json") == {str(path): {"caption": path.stem} for path in pictures}
    assert len(pictures) == 2


def test_texts_that_are_odd(merge, tmp_path):
    folder = fill(tmp_path / "data", {"latin.png": "caf\u00e9".encode("latin-1"), "mark.png": b"\xef\xbb\xbfmarked"})
    fill(folder, {"wide.png": "wide".encode("utf-16"), "other.png": "tags"}, ".caption")
    fill(folder, {"tagged.png": "tags"}, ".txt")
    (folder / "stray.caption").write_text("no picture")
    (folder / "bad.png").touch()
    (folder / "bad.caption").symlink_to("nowhere")
    (folder / "folder.png").touch()
    said = merge(CAPTIONS, "data", "meta.json", "--caption_extention", "caption")
    assert read(tmp_path / "meta.json") == {
        "latin": {"caption": "caf\u00e9"},
        "mark": {"caption": "marked"},
        "other": {"caption": "tags"},
        "wide": {"caption": "wide"},
    }
    assert "1 file is not UTF-8 and is read as Latin-1: data/latin.caption" in said
    assert "1 .caption file has no picture and is not used: data/stray.caption" in said
    assert "1 of the 7 pictures in data has a .txt file and no .caption file: the .txt files are not used" in said


def test_texts_that_cannot_be_read_fail(merge, tmp_path, monkeypatch):
    fill(tmp_path / "data", dict.fromkeys(("a.png", "b.png", "c.png"), "text"))
    (tmp_path / "meta.json").write_text('{"b": {"caption": "kept"}}')
    monkeypatch.setattr(
        merging, "read_caption", lambda path: reading.read_caption(path) if "a.cap" in path else Caption(None)
    )
    said = merge(CAPTIONS, "data", "meta.json")
    assert read(tmp_path / "meta.json") == {"b": {"caption": "kept"}, "a": {"caption": "text"}}
    assert "captions: 1 written, 0 skipped, 2 failed (data/b.caption, data/c.caption)" in said
    (tmp_path / "data" / "a.caption").unlink()
    with pytest.raises(SystemExit, match="2"):
        merge(CAPTIONS, "data", "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("dat out.json", "train_data_dir: the folder dat does not exist, did you mean data?"),
        ("data out.json --in_json mets.json", "--in_json: mets.json does not exist, did you mean meta.json?"),
        ("data out.json --in_json broken.json", "broken.json: line 1: no valid JSON"),
        ("data data", "out_json: data is a folder"),
        ("data meta.json/out.json", "meta.json is a file"),
        ("data out.json --recursive", "--recursive: pictures in several folders may have the same name"),
        (
            "data out.json --caption_extension .text",
            "3 of the 3 pictures in data have a .caption file and no .text file",
        ),
        ("tagged out.json", "have a .txt file and no .caption file: if that is what is to be merged, add"),
        ("bare out.json", "bare: there is no .caption file for any of the pictures (1)"),
        ("nothing out.json", "there are no pictures in nothing, but in those below it: add --recursive"),
        ("data out.json --caption_extensoin .txt", "did you mean --caption_extension?"),
        ("data", "required: out_json"),
        ("data out.json --caption_extension .", "--caption_extension: '.' is no ending"),
    ],
)
def test_what_is_refused(words, sentence, mistake, tmp_path):
    fill(tmp_path / "data", dict.fromkeys(("a.png", "b.png", "c.png"), "text"))
    fill(tmp_path / "tagged", dict.fromkeys(("a.png", "b.png"), "text"), ".txt")
    fill(tmp_path / "bare", {"a.png": None})
    fill(tmp_path / "nothing" / "deeper", {"a.png": "text"})
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"a": ')
    assert sentence in mistake(*words.split())


def test_against_a_dictionary(merge, tmp_path):
    """Many files with entries in all spellings, of pictures with and without texts, and of others."""
    draw = random.Random(9)
    names = [f"{stem}{number}" for number in range(6) for stem in ("a", "é", "x.y ", "_")]
    for number in range(12):
        have = draw.sample(names, draw.randint(1, 20))
        texts = {f"{name}.{draw.choice(['png', 'jpg'])}": draw.choice([f"text {name}", None]) for name in have}
        texts["sure.png"] = "sure"
        folder = fill(tmp_path / str(number), texts)
        spellings = {name: draw.choice([Path(name).stem, name]) for name in texts}
        known = draw.sample(sorted(spellings), draw.randint(0, len(texts)))
        expected = {spellings[name]: {"caption": "old", "n": draw.random()} for name in known}
        expected |= {f"other {n}": {"caption": "theirs"} for n in range(draw.randint(0, 3))}
        items = draw.sample(sorted(expected.items()), len(expected))
        (tmp_path / "in.json").write_text(json.dumps(dict(items)))
        merge(CAPTIONS, folder, "out.json", "--in_json", "in.json")
        for name, text in texts.items():
            if text is not None:
                expected.setdefault(spellings[name] if name in known else Path(name).stem, {})["caption"] = text
        result = read(tmp_path / "out.json")
        assert result == expected
        assert [key for key in result if key in dict(items)] == [key for key, _ in items]


def test_interrupted_while_writing(merge, tmp_path, monkeypatch, capsys):
    fill(tmp_path / "data", {"a.png": "text"})
    (tmp_path / "meta.json").write_text("{}")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("library.preprocessing.metadata.keys.Keys.new", interrupt)
    with pytest.raises(SystemExit, match="130"):
        merge(CAPTIONS, "data", "meta.json")
    assert (tmp_path / "meta.json").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "meta.json"}
