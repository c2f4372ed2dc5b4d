"""The script that cleans captions and tags, and each of its rules."""

import json
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from finetune import clean_captions_and_tags
from finetune.clean_captions_and_tags import RULES
from library import cli
from library.errors import UserError
from library.preprocessing.metadata.cleaning import clean_caption, clean_tags
from library.preprocessing.metadata.rules import Rules, read_rules
from tests.processes import run
from tests.test_merge_metadata import as_in_tables, read
from tests.test_options import alike, flags_of, table

SCRIPT = "finetune/clean_captions_and_tags.py"
DEFAULT = read_rules(RULES)
EYES = "multiple girls, blue eyes, {}"


@pytest.fixture
def tool(monkeypatch, fresh_console, tmp_path) -> Callable[..., None]:
    """The script in this process and in `tmp_path`."""

    def call(*words: object) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(clean_captions_and_tags.main)

    return call


@pytest.fixture
def rules(tmp_path) -> Callable[[str], Rules]:
    def make(text: str) -> Rules:
        (tmp_path / "rules.toml").write_text(text)
        return read_rules(tmp_path / "rules.toml")

    return make


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("", ""),
        ("1girl,solo ,, school_uniform,", "1girl, solo, school uniform"),
        ("1girl\nlooking_at_viewer\n", "1girl, looking at viewer"),
        ("^_^, closed_mouth, _", "^_^, closed mouth"),
        (">_<", "> <"),
        # ratings end the list, but leave it alone where they come first
        ("tree, rating:safe", "tree"),
        ("tree, rating_questionable, sky", "tree"),
        ("rating:safe, tree, rating:safe, sky", "tree"),
        ("rating:safe", ""),
        ("operating_table, karate_rating", "operating table, karate rating"),
        # one of a kind among several
        ("2girls, long_hair, short_hair, smile", "2girls, smile"),
        ("6+boys, blue_hair, very_long_hair, Blonde_Hair", "6+boys, very long hair"),
        ("2girls, bob_cut, hime_cut, black_hair", "2girls, black hair"),
        (EYES.format("red eyes"), "multiple girls"),
        (EYES.format("blue eyes"), "multiple girls, blue eyes, blue eyes"),
        (EYES.format("long sleeves, sleeveless dress"), "multiple girls, blue eyes"),
        (EYES.format("ponytail, twin_braids, ahoge"), "multiple girls, blue eyes, ahoge"),
        (
            "1girl, 1boy, long hair, short hair, blue eyes, red eyes",
            "1girl, 1boy, long hair, short hair, blue eyes, red eyes",
        ),
        ("girls_und_panzer, blue eyes, red eyes", "girls und panzer, blue eyes, red eyes"),
        *[(f"{count}, blue eyes, red eyes", count) for count in ("7girls", "5+boys", "girls", "multiple others")],
        ("1girl, big brothers, blue eyes, red eyes", "1girl, big brothers, blue eyes, red eyes"),
        ("2girls, amber hair, red hair, long hair, wavy hair", "2girls, long hair, wavy hair"),
        # words of longer tags
        ("shirt, white_shirt, t-shirt, skirt", "white shirt, t-shirt, skirt"),
        ("Shirt, white shirt, shirt", "white shirt"),
        ("white shirt, shirt lift, white", "white shirt, shirt lift, white"),
        ("hair bow, red hair bow", "hair bow, red hair bow"),
        ("hat, witch hat, 1girl", "witch hat, 1girl"),
        # what captions have replaced is none of the tags' business
        ("woman, person, male_focus", "woman, person, male focus"),
    ],
)
def test_tags(tags, cleaned):
    assert clean_tags(tags, DEFAULT) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a woman and two women", "a girl and two girls"),
        ("Lady in red. ladies, a person and people", "Girl in red. girls, a girl and girls"),
        ("a female, females, persons", "a girl, girls, girls"),
        ("a man, men, a male and males", "a boy, boys, a boy and boys"),
        ("an anime girl; anime  girls; An anime boy", "a girl; girls; A boy"),
        ("an anime woman, anime anime ladies", "a girl, girls"),
        ("a woman's hat, women's hats, the ladies' room", "a girl's hat, girls' hats, the girls' room"),
        ("WOMAN, a Woman, women\u2019s", "GIRL, a Girl, girls\u2019"),
        ("womanly policewoman salesperson ladybug mankind woman_x man-made", None),
        ("1girl, human, semen, animegirl", None),
        ("first woman\nanime\ngirl\n", "first girl\nanime\ngirl\n"),
        ("lad\u0131es", None),  # the dotless i is a letter of its own
    ],
)
def test_captions(caption, cleaned):
    assert clean_caption(caption, DEFAULT) == (cleaned or caption)


WORDS = (
    "2girls",
    "1boy",
    "long hair",
    "red_hair",
    "blue hair",
    "hair",
    "eyes",
    "red eyes",
    "_",
    "^_^",
    "shirt",
    "Eyes",
)
ENDS = ("white_shirt", "rating:safe", "rating", "closed__eyes", "braid", "twin braids", " ", "_shirt_", "\n", "x_^_^")


@settings(deadline=None, max_examples=50)
@given(some.lists(some.sampled_from(WORDS + ENDS)))
def test_cleaning_tags_again_changes_nothing(tags):
    once = clean_tags(",".join(tags), DEFAULT)
    assert clean_tags(once, DEFAULT) == once


@settings(deadline=None, max_examples=50)
@given(some.lists(some.sampled_from(("an", "anime", "a", "woman", "women's", "person", "men", "girl", "boys", "\n"))))
def test_cleaning_captions_again_changes_nothing(words):
    once = clean_caption(" ".join(words), DEFAULT)
    assert clean_caption(once, DEFAULT) == once


def test_rules_of_ones_own(rules):
    own = rules(
        """
        [tags]
        underscores_to_spaces = true
        keep_underscores_in = ["o_o", ">_<"]
        end_at = ["credits", "meta:*"]
        [several_people]
        when = ["crowd"]
        [several_people.one_of_a_kind]
        hats = ["* hat", "beret", "!* straw hat"]
        [captions.replace]
        "sks dog" = ["puppy", "golden (?)"]
        """
    )
    assert clean_tags("o_o, >_<, to_o, o_of, shirt, red_shirt", own) == "o_o, >_<, to o, o of, shirt, red shirt"
    assert clean_tags("crowd, beret, top_hat, A straw hat, 2girls, Meta:x, y", own) == "crowd, A straw hat, 2girls"
    assert clean_caption("a puppy with a golden (?)", own) == "a sks dog with a sks dog"
    nothing = rules("")
    assert clean_tags("2girls,red_eyes,blue_eyes,rating:safe,shirt,red shirt", nothing).startswith("2girls, red_eyes")
    assert clean_caption("a woman", nothing) == "a woman"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tag]", "tag: unknown rule, did you mean tags?"),
        ("[tags]\nend = []", "tags.end: unknown rule, did you mean end_at?"),
        ("[several_people]\nwhen = '2girls'", "several_people.when: must be a list of texts"),
        ("[several_people.one_of_a_kind]\neyes = [1]", "several_people.one_of_a_kind.eyes: must be a list of texts"),
        ("tags = 1", "tags: must be a section"),
        ("[captions]\nreplace = []", "captions.replace: must be a section"),
        ("[tags]\nunderscores_to_spaces = 1", "tags.underscores_to_spaces: must be true or false"),
        ("[tags]\nend_at = [''] ", "tags.end_at: must be a list of texts"),
        ("[captions.replace]\na = ['b']\nb = ['a']", "captions.replace: 'b' would be replaced again and again"),
        ("[captions.replace]\n'a big dog' = ['dog']", "captions.replace: 'dog' would be replaced again and again"),
        ("[captions.replace]\na = ['c']\nb = ['C']", "captions.replace: 'C' becomes both 'a' and 'b'"),
        ("[tags", "this file of rules is not valid TOML"),
    ],
)
def test_rules_that_are_refused(text, sentence, rules):
    with pytest.raises(UserError) as refusal:
        rules(text)
    assert f"rules.toml: {sentence}" in str(refusal.value)


def test_flags_are_those_of_the_table():
    rows, ours = table("finetune__clean_captions_and_tags"), flags_of("finetune.clean_captions_and_tags")
    there = {flag: as_in_tables(row) for flag, row in ours.items()}
    assert there.pop("--rules")
    assert there.pop("--force")
    assert there == {flag: alike(row) for flag, row in rows.items()}


def test_all_entries_are_cleaned_and_nothing_else_changes(tmp_path):
    meta, clean = tmp_path / "meta ü.json", tmp_path / "clean.json"
    entries = {
        "/b/ü.png": {"caption": "a woman\na man", "tags": "2girls, rating:safe", "n": [1]},
        "a": {"caption": "a tree", "tags": "tree"},
        "neither": {"other": "a_woman"},
        "tags": {"tags": "school_uniform", "caption": None},
        "odd": {"caption": "woman", "tags": ["list_of"]},
        "odd too": {"caption": 1, "tags": "a"},
    }
    meta.write_text(json.dumps(entries))
    done = run([sys.executable, SCRIPT, meta, clean, "--debug"], 60)
    assert done.returncode == 0, done.stderr
    changes = {
        "/b/ü.png": {"caption": "a girl\na boy", "tags": "2girls", "n": [1]},
        "tags": {"tags": "school uniform", "caption": None},
        "odd": {"caption": "girl", "tags": ["list_of"]},
    }
    assert list(read(clean).items()) == list((entries | changes).items())
    assert read(meta) == entries
    assert "odd: what is no text stays as it is: tags" in done.stderr
    assert "entries: 2 cleaned and written, 2 skipped as they were clean already, 2 failed" in done.stdout
    assert "6 entries, 2 with another caption and 2 with other tags than before" in done.stdout
    assert "'/b/ü.png': caption: 'a woman\\na man' -> 'a girl\\na boy'\n" in done.stdout


def test_a_file_may_be_cleaned_in_place_and_by_other_rules(tool, tmp_path, capsys):
    meta = tmp_path / "meta.json"
    meta.write_text('{"a": {"caption": "a woman", "tags": "b_c"}}')
    (tmp_path / "mine.toml").write_text("[captions.replace]\nlady = ['woman']")
    tool("meta.json", "meta.json", "--rules", "mine.toml")
    assert read(meta) == {"a": {"caption": "a lady", "tags": "b_c"}}
    tool("meta.json", "meta.json", "--rules", "mine.toml")
    assert "0 cleaned and written, 1 skipped" in capsys.readouterr().out
    meta.with_name("out.json").write_text('{"b": {}}')
    tool("meta.json", "out.json")
    assert "out.json is made anew from meta.json, and 1 entry is not there and is lost: b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("mets.json out.json", "in_json: mets.json does not exist, did you mean meta.json?"),
        ("empty.json out.json", "empty.json: there are no entries"),
        ("list.json out.json", "list.json: line 1: no valid JSON"),
        ("meta.json folder", "out_json: folder is a folder"),
        ("meta.json out.json --rules rule.toml", "rule.toml: there is no such file of rules, did you mean rules.toml?"),
        ("meta.json out.json --rule rules.toml", "--rule: unknown option, did you mean --rules?"),
        ("--in_json meta.json out.json", "--in_json: the file to read is named without a flag"),
    ],
)
def test_what_is_refused(words, sentence, mistake, tmp_path):
    for name, text in {"meta": '{"a": {}}', "empty": "{}", "list": "[]"}.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "rules.toml").touch()
    (tmp_path / "folder").mkdir()
    assert sentence in mistake(*words.split())
