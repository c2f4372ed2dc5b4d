"""The caption pipeline against captions made by the toolkit we replace, and its laws for any text."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import CaptionOptions, compose, fixed, is_dropped, possible, varies
from library.randomness import generator

GOLDEN = Path(__file__).parent / "data" / "golden" / "captions.json"


def draw(caption, *, seed=0, epoch=1, step=0, total_steps=100, templates=(), **options):
    return compose(
        caption,
        CaptionOptions(**options),
        rng=generator(seed, "caption"),
        epoch=epoch,
        step=step,
        total_steps=total_steps,
        templates=templates,
    )


def draws(caption, count=200, **options):
    return Counter(draw(caption, seed=seed, **options) for seed in range(count))


def test_golden_captions():
    rows = json.loads(GOLDEN.read_text())
    assert len(rows) > 60
    for row in rows:
        drawn = draw(
            row["caption"],
            epoch=row["epoch"],
            step=row["step"],
            total_steps=row["max_train_steps"],
            **row["options"],
        )
        assert drawn == row["result"], row


def test_prefix_and_suffix_belong_to_the_whole_caption():
    assert draw("a\nb", caption_prefix="p", caption_suffix="s") == "p a"
    assert set(draws("a\nb", caption_prefix="p", caption_suffix="s", enable_wildcard=True)) == {"p a", "b s"}


class TestWildcards:
    def test_each_line_that_is_not_blank_turns_up_and_evenly(self):
        drawn = draws("one\n\ntwo\n three ", count=600, enable_wildcard=True)
        assert set(drawn) == {"one", "two", " three "}
        assert min(drawn.values()) > 150

    def test_each_alternative_turns_up_and_choices_are_independent(self):
        drawn = draws("{a|b} {c|}", count=400, enable_wildcard=True)
        assert set(drawn) == {"a c", "b c", "a ", "b "}
        assert min(drawn.values()) > 60

    def test_choices_within_choices(self):
        assert set(draws("{a|{b|c}}", enable_wildcard=True)) == {"a", "b", "c"}
        assert set(draws("{{{a|b} {c}}}", enable_wildcard=True)) == {"{a c}", "{b c}"}

    @pytest.mark.parametrize("caption", ["a { b", "a } b", "} a {", "{}", ":{ a|b", "a|b"])
    def test_unpaired_braces_stay_as_they_are(self, caption):
        assert draw(caption, enable_wildcard=True) == caption

    def test_without_the_option_braces_and_lines_mean_nothing(self):
        assert draw("{a|b} {{c}}\nd") == "{a|b} {{c}}"

    @given(st.text(st.characters(exclude_characters="\n")), st.integers(0, 100))
    def test_doubled_braces_are_literal(self, text, seed):
        doubled = "x" + text.replace("{", "{{").replace("}", "}}")
        assert draw(doubled, seed=seed, enable_wildcard=True) == "x" + text


class TestSplitting:
    def test_every_order_turns_up(self):
        assert len(draws("a, b, c", shuffle_caption=True)) == 6

    def test_what_is_outside_the_marks_stays(self):
        drawn = draws("a, b, ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=1)
        assert set(drawn) == {"a, b, c, d, e", "a, b, d, c, e"}

    def test_the_secondary_separator_binds_tags_together(self):
        drawn = draws("a;;;b, c", shuffle_caption=True, secondary_separator=";;;")
        assert set(drawn) == {"a,b, c", "c, a,b"}

    def test_another_separator(self):
        assert set(draws("x; a, b; c", caption_separator=";", shuffle_caption=True, keep_tokens=2)) == {"x, a, b, c"}

    def test_token_warm_up_over_a_share_of_the_run(self):
        options = {"token_warmup_step": 0.5, "token_warmup_min": 1}
        counts = [len(draw("a,b,c,d,e", step=step, total_steps=16, **options).split(",")) for step in range(0, 10, 2)]
        assert counts == [1, 2, 3, 4, 5]
        assert draw("a,b", step=0, token_warmup_min=5, token_warmup_step=10) == "a, b"

    def test_warm_up_comes_before_shuffling(self):
        assert set(draws("a, b, c, d", token_warmup_step=10, token_warmup_min=2, shuffle_caption=True)) == {
            "a, b",
            "b, a",
        }


class TestTemplates:
    def test_one_of_them_takes_the_place_of_the_caption_whatever_its_options_are(self):
        texts = {
            draw("a, b", seed=seed, templates=["x", "y"], shuffle_caption=True, caption_prefix="p")
            for seed in range(20)
        }
        assert texts == {"x", "y"}

    def test_a_dropped_caption_is_empty(self):
        assert draw("cat", templates=["x"], caption_dropout_rate=1.0) == ""


def test_all_that_a_caption_may_become_is_possible():
    options = CaptionOptions(caption_prefix="p", caption_suffix="s")
    assert possible("a\nb", options) == "p a"
    assert possible("a\n{b|c}", dataclasses.replace(options, enable_wildcard=True)) == "p a\n{b|c} s"


class TestDropout:
    # Bounds of five standard deviations.
    def test_whole_captions_at_their_rate(self):
        drawn = draws("a, b", count=2000, caption_dropout_rate=0.3)
        assert abs(drawn[""] / 2000 - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5

    def test_every_so_many_epochs(self):
        dropped = [draw("a", epoch=epoch, caption_dropout_every_n_epochs=3) == "" for epoch in range(1, 8)]
        assert dropped == [False, False, True, False, False, True, False]

    def test_tags_at_their_rate_wherever_they_are(self):
        options = {"caption_tag_dropout_rate": 0.2, "shuffle_caption": True, "keep_tokens": 1}
        count = Counter()
        for seed in range(1500):
            count.update(draw("k, a, b, c, d", seed=seed, **options).split(", "))
        assert count["k"] == 1500
        for tag in "abcd":
            assert abs(count[tag] / 1500 - 0.8) < 5 * (0.2 * 0.8 / 1500) ** 0.5


class TestRandomness:
    def test_asking_for_the_dropout_alone_gives_the_same_answer(self):
        options = CaptionOptions(caption_dropout_rate=0.5, shuffle_caption=True, enable_wildcard=True)
        for seed in range(50):
            alone = is_dropped(options, rng=generator(seed), epoch=1)
            assert alone == (compose("a, {b|c}", options, rng=generator(seed)) == "")

    def test_one_option_does_not_change_what_another_draws(self):
        plain = {"caption_tag_dropout_rate": 0.5, "enable_wildcard": True}
        more = plain | {"shuffle_caption": True}
        for seed in range(50):
            lines = "{a|b}, {a|b}, {a|b}\n{c|d}, {c|d}, {c|d}"
            every_tag = {"caption_tag_dropout_rate": 1e-12, "enable_wildcard": True, "seed": seed}
            chosen = draw(lines, **every_tag).split(", ")
            assert sorted(draw(lines, shuffle_caption=True, **every_tag).split(", ")) == sorted(chosen)
            assert len(draw(lines, seed=seed, **plain)) == len(draw(lines, seed=seed, **more))

    @given(st.text(), st.integers(0, 5), st.booleans(), st.booleans(), st.sampled_from(["", "|||"]), st.integers(0, 99))
    def test_any_text_is_a_function_of_the_generator_alone(self, caption, keep, shuffle, wildcard, mark, seed):
        options = {"keep_tokens": keep, "shuffle_caption": shuffle, "enable_wildcard": wildcard}
        options |= {"keep_tokens_separator": mark, "caption_tag_dropout_rate": 0.3, "caption_prefix": "p"}
        random.seed(1)
        np.random.seed(1)
        first = draw(caption, seed=seed, **options)
        random.seed(2)
        np.random.seed(2)
        assert draw(caption, seed=seed, **options) == first


tags = st.lists(st.text(st.characters(exclude_characters=",\n", exclude_categories=["Cs"])).map(str.strip), min_size=1)


class TestLaws:
    @given(tags, st.integers(0, 10), st.integers(0, 2**32))
    def test_shuffling_keeps_the_first_tags_in_place_and_invents_and_loses_none(self, tags, keep_tokens, seed):
        drawn = draw(",".join(tags), keep_tokens=keep_tokens, shuffle_caption=True, seed=seed).split(", ")
        assert drawn[:keep_tokens] == tags[:keep_tokens]
        assert sorted(drawn) == sorted(tags)

    @given(tags, st.integers(0, 10), st.floats(0, 1), st.integers(0, 20), st.booleans(), st.integers(0, 2**32))
    def test_kept_tags_stay_and_none_is_invented_whatever_is_dropped(self, tags, keep, rate, step, shuffle, seed):
        kept = tags[:keep]
        drawn = draw(
            ",".join(tags),
            keep_tokens=keep,
            caption_tag_dropout_rate=rate,
            token_warmup_step=10,
            shuffle_caption=shuffle,
            step=step,
            seed=seed,
        ).split(", ")
        assert drawn[: len(kept)] == kept
        assert not Counter(drawn) - Counter(tags) - Counter([""])

    @given(st.text(), st.text(), st.text(), st.sampled_from(["", ";;;", "a"]), st.integers(0, 9))
    def test_what_does_not_vary_is_fixed(self, caption, prefix, suffix, secondary, seed):
        options = CaptionOptions(
            caption_prefix=prefix, caption_suffix=suffix, secondary_separator=secondary, keep_tokens=2
        )
        assert varies(options) is None
        assert compose(caption, options, rng=generator(seed)) == fixed(caption, options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shuffle_caption", True),
        ("enable_wildcard", True),
        ("caption_tag_dropout_rate", 0.1),
        ("token_warmup_step", 0.5),
    ],
)
def test_options_that_vary_captions_are_named(name, value):
    assert varies(CaptionOptions(**{name: value})) == name


def test_whole_caption_dropout_does_not_count_as_varying():
    assert varies(CaptionOptions(caption_dropout_rate=0.5, caption_dropout_every_n_epochs=2)) is None
