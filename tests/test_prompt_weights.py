"""Weights in captions, and captions in chunks."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.models.prompt_weights import BEGIN, END, chunks, split_weights, weight_chunks

BRACKETS = st.text(alphabet="()[]\\\\:.+-19a ,\n")


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 1 / 1.1), (" cat", 1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: .5 )(blue:2.)", [("red", 0.5), ("blue", 2)]),
        ("(red:-1)(blue:+1.5)(no:0)", [("red", -1), ("blue", 1.5), ("no", 0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:1.5) cat:2)", [("a ", 2), ("red", 3), (" cat", 2)]),
        ("[(red:1.1)]", [("red", 1.1 / 1.1)]),
        ("([red:1.5)]", [("red", 1.5 / 1.1)]),
        (r"a \(film\)", [("a (film)", 1)]),
        (r"\[a\] \\ b", [("[a] \\ b", 1)]),
        (r"(\(a\):2)", [("(a)", 2)]),
        (r"\o/ \m/", [(r"\o/ \m/", 1)]),
        ("a) b] :1.5)", [("a) b] :1.5)", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / 1.1), ("c", 1.1 / 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("() []", [(" ", 1)]),
        ("time 10:30", [("time 10:30", 1)]),
    ],
)
def test_pieces(caption, pieces):
    found = split_weights(caption)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text() | BRACKETS)
def test_no_text_is_too_odd(caption):
    pieces = split_weights(caption)
    assert all(first[1] != second[1] for first, second in pairwise(pieces))
    if not set(caption) & set("()[]\\"):
        assert pieces == [(caption, 1.0)]


@given(st.text() | BRACKETS)
def test_with_backslashes_any_text_stands_for_itself(caption):
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in caption)
    assert split_weights(escaped) == [(caption, 1.0)]


@settings(deadline=None)
@given(st.integers(0, 300), st.sampled_from([75, 150, 225]), st.sampled_from([0, END]))
def test_chunks_hold_the_beginning_of_a_caption_in_order(count, length, pad):
    ids = list(range(1, count + 1))
    rows = chunks(ids, length, pad)
    assert [len(row) for row in rows] == [77] * (length // 75)
    assert all(row[0] == BEGIN and END in row and set(row[row.index(END) + 1 :]) <= {pad} for row in rows)
    assert [number for row in rows for number in row[1 : row.index(END)]] == ids[:length]
    weights = weight_chunks([2.0] * count, length)
    own = [[1.0 if number in (BEGIN, END, pad) else 2.0 for number in row] for row in rows]
    assert weights == own
