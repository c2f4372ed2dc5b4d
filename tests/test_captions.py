"""The caption pipeline against captions made by the toolkit we replace, and its laws for any text."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import compose
from library.randomness import generator

GOLDEN = Path(__file__).parent / "data" / "golden" / "captions.json"


def draw(caption, *, separator=",", keep_tokens=0, shuffle=False, seed=0):
    rng = generator(seed, "caption")
    return compose(caption, separator=separator, keep_tokens=keep_tokens, shuffle=shuffle, rng=rng)


def test_golden_captions():
    rows = json.loads(GOLDEN.read_text())
    assert rows
    for row in rows:
        options = row["options"]
        drawn = draw(
            row["caption"], keep_tokens=options.get("keep_tokens", 0), shuffle=options.get("shuffle_caption", False)
        )
        assert drawn == row["result"]


def test_only_the_first_line_is_used():
    assert draw("a, b\nc") == "a, b"
    assert draw("a, b\nc", shuffle=True) in ("a, b", "b, a")


def test_without_shuffling_a_caption_stays_as_written():
    assert draw("a ,b,,  c", keep_tokens=1) == "a ,b,,  c"


def test_another_separator():
    assert sorted(draw("a, b; c", separator=";", shuffle=True).split(", ")) == ["a", "b", "c"]
    assert draw("x; a, b", separator=";", shuffle=True, keep_tokens=2) == "x, a, b"


def test_every_order_turns_up():
    assert len({draw("a, b, c", shuffle=True, seed=seed) for seed in range(100)}) == 6


tags = st.lists(st.text(st.characters(exclude_characters=",\n", exclude_categories=["Cs"])).map(str.strip), min_size=1)


@given(tags, st.integers(0, 10), st.integers(0, 2**32))
def test_shuffling_keeps_the_first_tags_in_place_and_invents_and_loses_none(tags, keep_tokens, seed):
    drawn = draw(",".join(tags), keep_tokens=keep_tokens, shuffle=True, seed=seed).split(", ")
    assert drawn[:keep_tokens] == tags[:keep_tokens]
    assert sorted(drawn) == sorted(tags)


@given(st.text(), st.integers(0, 5), st.booleans(), st.integers(0, 2**32))
def test_a_drawing_depends_on_its_seed_alone(caption, keep_tokens, shuffle, seed):
    first, second = (draw(caption, keep_tokens=keep_tokens, shuffle=shuffle, seed=seed) for _ in range(2))
    assert first == second
