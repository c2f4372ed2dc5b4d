"""Which tags are written of which probabilities: known answers."""

from pathlib import Path

import numpy as np
import pytest

from library.errors import UserError
from library.options.tag_images import TagImagesOptions
from library.preprocessing.tagging.results import extended, tags_in
from library.preprocessing.tagging.rules import Tag, TagRules, expanded, read_tags

TAGS = [
    Tag("general", "rating"),
    Tag("explicit", "rating"),
    Tag("1girl", "general"),
    Tag("blue_eyes", "general"),
    Tag("^_^", "general"),
    Tag("long_hair", "general"),
    Tag("miku_(vocaloid)", "character"),
    Tag("saber", "character"),
    Tag("best", "quality"),
    Tag("worst", "quality"),
    Tag("artist_a", "artist"),
    Tag("series_a", "copyright"),
    Tag("scan", "meta"),
    Tag("model_a", "model"),
]
ALL = ["1girl", "blue_eyes", "^_^", "long_hair", "miku_(vocaloid)", "saber", "artist_a", "series_a", "scan", "model_a"]


def rules(**options: object) -> TagRules:
    return TagRules(TAGS, TagImagesOptions(train_data_dir="pictures", **options))


def names(probabilities: dict[str, float] | None = None, **options: object) -> list[str]:
    """What is written of these probabilities, of others 0; without any, of 0.9 for all."""
    row = [0.9 if probabilities is None else probabilities.get(tag.name, 0) for tag in TAGS]
    return rules(**options).names(np.array(row, np.float32))


@pytest.fixture(autouse=True)
def _fresh(fresh_console):
    """Whatever was said before."""


def test_tags_are_in_the_order_of_the_model():
    assert names() == ALL
    assert names({"saber": 0.4, "1girl": 0.5, "blue_eyes": 0.99}) == ["1girl", "blue_eyes", "saber"]


@pytest.mark.parametrize("threshold", [0.35, 0.1, 0.7, 1.0])
def test_a_threshold_is_reached_by_itself(threshold):
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    assert names({"1girl": threshold, "long_hair": below}, thresh=threshold) == ["1girl"]


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ("general", ["1girl", "blue_eyes", "^_^", "long_hair"]),
        ("character", ["miku_(vocaloid)", "saber"]),
        ("artist", ["artist_a"]),
        ("copyright", ["series_a"]),
        ("meta", ["scan"]),
        ("model", ["model_a"]),
    ],
)
def test_each_category_has_a_threshold_of_its_own(option, own):
    assert names(**{f"{option}_threshold": 0.95}) == [name for name in ALL if name not in own]
    assert names(thresh=0.95, **{f"{option}_threshold": 0.9}) == own
    assert names(dict.fromkeys(ALL, 0.0), **{f"{option}_threshold": 0.0}) == own  # 0 is a threshold too


def test_of_ratings_and_qualities_the_most_probable_is_written():
    found = {"general": 0.2, "explicit": 0.1, "best": 0.05, "worst": 0.3, "1girl": 0.9}
    assert names(found) == ["1girl"]
    assert names(found, use_rating_tags=True) == ["general", "1girl"]
    assert names(found, use_quality_tags=True, use_rating_tags=True) == ["general", "worst", "1girl"]
    assert names(found, use_rating_tags_as_last_tag=True, use_quality_tags=True) == ["worst", "1girl", "general"]
    last = {"use_rating_tags_as_last_tag": True, "use_quality_tags_as_last_tag": True}
    assert names(found, **last) == names(found, use_rating_tags=True, **last) == ["1girl", "general", "worst"]


def test_a_model_without_ratings():
    plain = TagRules([Tag("a", "general")], TagImagesOptions(train_data_dir="x", use_rating_tags=True))
    assert plain.names(np.ones(1, np.float32)) == ["a"]


def test_characters_first():
    expected = ["miku_(vocaloid)", "saber", *(name for name in ALL if name not in ("miku_(vocaloid)", "saber"))]
    assert names(character_tags_first=True) == expected
    assert names(character_tags_first=True, use_rating_tags=True) == ["general", *expected]


def test_what_is_always_first_is_in_the_order_given():
    found = names(always_first_tags="saber, long hair,1girl", use_rating_tags=True, character_tags_first=True)
    assert found[:5] == ["saber", "long_hair", "1girl", "general", "miku_(vocaloid)"]
    assert sorted(found) == sorted(["general", *ALL])
    assert names({"1girl": 1}, always_first_tags="saber,1girl") == ["1girl"]  # only what is there


def test_underscores_stay_in_faces():
    spaced = names(remove_underscore=True)
    assert spaced == [name if name == "^_^" else name.replace("_", " ") for name in ALL]


@pytest.mark.parametrize("remove_underscore", [False, True])
@pytest.mark.parametrize("words", ["blue_eyes,^_^", "blue eyes, ^_^ ,"])
def test_undesired_tags_are_named_in_either_spelling(words, remove_underscore):
    found = names(undesired_tags=words, remove_underscore=remove_underscore, use_rating_tags=True)
    assert len(found) == len(ALL) - 1
    assert not {"blue_eyes", "blue eyes", "^_^"} & {*found}


def test_lists_may_be_separated_as_tags_are_in_files():
    assert names({"1girl": 1, "saber": 1}, undesired_tags="1girl|scan", caption_separator=" | ") == ["saber"]


def test_tags_are_replaced():
    found = {"1girl": 1, "blue_eyes": 1, "saber": 1}
    assert names(found, tag_replacement="1girl,girl;blue eyes,eyes_(blue)") == ["girl", "eyes_(blue)", "saber"]
    assert names(found, tag_replacement=r"1girl,a\, b;saber,c\;d;", remove_underscore=True) == [
        "a, b",
        "blue eyes",
        "c;d",
    ]
    assert names(found, tag_replacement=r"saber,saber \(fate\)")[-1] == r"saber \(fate\)"
    assert names(found, tag_replacement="1girl,x;saber,x") == ["x", "blue_eyes"]  # each name once


def test_what_replaces_a_tag_is_looked_at_in_its_place():
    found = {"1girl": 1, "saber": 1, "explicit": 1}
    assert names(found, tag_replacement="1girl,girl", undesired_tags="1girl") == ["girl", "saber"]
    assert names(found, tag_replacement="1girl,girl", undesired_tags="girl") == ["saber"]
    assert names(found, tag_replacement="saber,a girl", always_first_tags="a_girl") == ["a girl", "1girl"]
    assert names(found, tag_replacement="explicit,nsfw", use_rating_tags=True) == ["nsfw", "1girl", "saber"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("miku_(vocaloid)", ["miku", "vocaloid"]),
        ("saber_(alter)_(fate)", ["saber_(alter)", "fate"]),
        ("artoria (fate)", ["artoria", "fate"]),
        ("saber", ["saber"]),
        ("(o)_(o)x", ["(o)_(o)x"]),
        ("_(x)", ["_(x)"]),
        ("x_()", ["x_()"]),
    ],
)
def test_characters_in_two_parts(name, parts):
    assert expanded(name) == parts


def test_characters_are_expanded():
    found = {"miku_(vocaloid)": 1, "1girl": 1, "series_a": 1}
    expand = {"character_tag_expand": True}
    assert names(found, **expand) == ["1girl", "miku", "vocaloid", "series_a"]
    assert names(found, character_tags_first=True, **expand) == ["miku", "vocaloid", "1girl", "series_a"]
    assert names(found, tag_replacement="vocaloid,singer", **expand) == ["1girl", "miku", "singer", "series_a"]
    assert names(found, undesired_tags="vocaloid", **expand) == ["1girl", "miku", "series_a"]
    whole = "miku (vocaloid)"
    assert names(found, undesired_tags=whole, **expand) == ["1girl", "series_a"]
    assert names(found, tag_replacement=f"{whole},her", **expand) == ["1girl", "her", "series_a"]


def test_misspelt_tags_are_told(capsys):
    rules(undesired_tags="blue_eye,saber", always_first_tags="girl", tag_replacement="1girl,girl;sabre,x")
    said = capsys.readouterr().err
    assert "--undesired_tags: blue_eye is no tag of this model, did you mean blue_eyes?" in said
    assert "--tag_replacement: sabre is no tag of this model, did you mean saber?" in said
    assert said.count("warning: ") == 2


@pytest.mark.parametrize("text", ["1girl", "1girl,", "1girl,a,b", r"1girl\,a"])
def test_replacements_are_pairs(text):
    with pytest.raises(UserError, match=r"--tag_replacement: .* is not written as old,new"):
        TagImagesOptions(train_data_dir="x", tag_replacement=f"saber,a;{text}")


# --- lists of tags ---


def test_categories_are_numbers_or_names(tmp_path):
    file = tmp_path / "tags.csv"
    rows = ["a,9", "b,0", "c,4", "d,1", "e,3", "f,5", "g,Rating", "h,Quality", "i,MODEL", "j,Character", '"k,l",0']
    file.write_text("\ufeffname,category\r\n" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    kinds = ["rating", "general", "character", "artist", "copyright", "meta"]
    kinds += ["rating", "quality", "model", "character", "general"]
    assert read_tags(file) == [Tag(name, kind) for name, kind in zip([*"abcdefghij", "k,l"], kinds, strict=True)]


def test_an_unknown_category_counts_as_general(tmp_path, fresh_console, capsys):
    (tmp_path / "tags.csv").write_text("name,category\na,12\n")
    assert read_tags(tmp_path / "tags.csv") == [Tag("a", "general")]
    assert "tags of the unknown category 12 count as general ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no column category, name"),
        (b"id,name\n1,a\n", "has no column category"),
        (b"name,category\n", "there are no tags in this list"),
        (b"name,category\na,0\nb\n", "line 3: a tag has a name and a category"),
        (b"name,category\na,0\n\xff\xfe,0\n", "is no CSV file in UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_lists_that_are_none(content, sentence, tmp_path):
    file: Path = tmp_path / "tags.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_tags(file)


# --- adding to tags ---


@pytest.mark.parametrize(
    ("text", "separator", "result"),
    [
        ("", ", ", "blue eyes, x"),
        ("a, b", ", ", "a, b, blue eyes, x"),
        ("a,blue_eyes", ", ", "a,blue_eyes, x"),
        ("rating:safe, blue eyes, x", ", ", "rating:safe, blue eyes, x"),
        ("a\nblue_eyes\nc", ", ", "a\nblue_eyes\nc\nx"),
        ("blue eyes", ", ", "blue eyes, x"),
        ("a, blue  eyes", ", ", "a, blue  eyes, x"),
        ("x | a", " | ", "x | a | blue eyes"),
        ("my blue eyes", ", ", "my blue eyes, blue eyes, x"),
    ],
)
def test_only_what_is_not_there_is_added(text, separator, result):
    assert extended(text, ["blue eyes", "x"], separator) == result
    assert extended(result, ["blue eyes", "x"], separator) == result


def test_tags_that_hold_what_separates_are_added_once():
    text = extended("a", ["b, c", "d"], ", ")
    assert text == extended(text, ["b, c", "d"], ", ") == "a, b, c, d"
    assert extended("a. mr. x. b", ["mr. x"], ". ") == "a. mr. x. b"


def test_tags_in_texts_of_other_taggers():
    assert tags_in("rating:safe, 1girl,a b\n c_d ,", ", ") == ["rating:safe", "1girl", "a b", "c_d"]
    assert tags_in("mr._x | a", " | ") == ["mr._x", "a"]
