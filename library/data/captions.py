"""The caption pipeline: what is on disk -> what the model reads. Pure functions of the caption and a generator."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CaptionOptions:
    """How a subset's captions are made from what is on disk. The names are those of the options."""

    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    """Empty: off."""
    secondary_separator: str = ""
    """Empty: off."""
    shuffle_caption: bool = False
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    """Steps; below 1 a fraction of the run's."""


def compose(
    caption: str,
    options: CaptionOptions,
    *,
    rng: np.random.Generator,
    epoch: int = 1,
    step: int = 0,
    total_steps: int = 1,
    templates: Sequence[str] = (),
) -> str:
    """One drawing of a caption, a function of the arguments and of the address of `rng`, a generator not yet used.

    Epochs count from 1, steps from 0. In this order: prefix and suffix; whole-caption dropout; with wildcards one
    random line and `{a|b}` choices (see `_choose`), else the first line. Only shuffling, tag dropout and token warm-up
    split the caption at the separator and join it with ", "; otherwise it stays as it is written. Then the secondary
    separator becomes the separator. Of `templates`, if there are any, one takes the place of all but the dropout.
    """
    if is_dropped(options, rng=rng, epoch=epoch):
        return ""
    # one for each step, so that no option changes what another one draws
    choices, order, dropout, template = rng.spawn(4)
    if templates:
        return templates[template.integers(len(templates))]
    text = _with_affixes(caption, options)
    text = _choose(_random_line(text, choices), choices) if options.enable_wildcard else _first_line(text)
    if options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0:
        front, loose, back = _split(text, options)
        loose = loose[: _warmed_up(len(loose), options, step, total_steps)]
        if options.shuffle_caption:
            loose = [loose[index] for index in order.permutation(len(loose))]
        stay = dropout.random(len(loose)) >= options.caption_tag_dropout_rate
        text = ", ".join(front + [tag for tag, stays in zip(loose, stay, strict=True) if stays] + back)
    return _with_separator(text, options)


def is_dropped(options: CaptionOptions, *, rng: np.random.Generator, epoch: int) -> bool:
    """Whether the whole caption is left out this time. Always takes one number from `rng`; epochs count from 1."""
    every = options.caption_dropout_every_n_epochs
    return bool(rng.random() < options.caption_dropout_rate) or (every > 0 and epoch % every == 0)


def fixed(caption: str, options: CaptionOptions) -> str:
    """The caption of every use that is not dropped, for options that leave it fixed (see `varies`)."""
    return _with_separator(_first_line(_with_affixes(caption, options)), options)


def possible(caption: str, options: CaptionOptions) -> str:
    """All text that uses of the caption can be made of."""
    text = _with_affixes(caption, options)
    return _with_separator(text if options.enable_wildcard else _first_line(text), options)


def varies(options: CaptionOptions) -> str | None:
    """The first option by which a caption changes from use to use, or None. Whole-caption dropout is not among them."""
    names = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step")
    return next((name for name in names if getattr(options, name) > 0), None)


def _with_affixes(caption: str, options: CaptionOptions) -> str:
    """Prefix and suffix belong to the whole caption: of several lines, the first has the one, the last the other."""
    text = f"{options.caption_prefix} {caption}" if options.caption_prefix else caption
    return f"{text} {options.caption_suffix}" if options.caption_suffix else text


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _random_line(text: str, rng: np.random.Generator) -> str:
    """One of the lines that are not blank."""
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    return lines[rng.integers(len(lines))]


_BRACES = re.compile(r"\{\{|\}\}|[{}|]|[^{}|]+")


def _choose(text: str, rng: np.random.Generator) -> str:
    """Each `{a|b}` replaced by one of its alternatives; `{{` and `}}` are literal braces.

    Choices may hold choices; there `}}` ends two of them. A brace without its partner and `{}` stay as they are.
    """
    levels = [[""]]  # the text, and the alternatives so far of each choice that is open

    def close() -> None:
        alternatives = levels.pop()
        levels[-1][-1] += "{}" if alternatives == [""] else alternatives[rng.integers(len(alternatives))]

    for token in _BRACES.findall(text):
        depth = len(levels) - 1
        if token == "{":
            levels.append([""])
        elif token == "|" and depth:
            levels[-1].append("")
        elif token == "}" and depth:
            close()
        elif token == "}}" and depth > 1:
            close()
            close()
        else:
            levels[-1][-1] += token[0] if token in ("{{", "}}") else token
    while len(levels) > 1:
        unfinished = "|".join(levels.pop())
        levels[-1][-1] += "{" + unfinished
    return levels[0][0]


def _split(text: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that may move or go, and those that stay at the end."""
    if options.keep_tokens_separator and options.keep_tokens_separator in text:
        front, _, rest = text.partition(options.keep_tokens_separator)
        loose, _, back = rest.partition(options.keep_tokens_separator)
        # A separator beside the mark, as in "a, ||| b", is no empty tag.
        return tuple([tag for tag in _tags(part, options) if tag] for part in (front, loose, back))
    tags = _tags(text, options)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _tags(text: str, options: CaptionOptions) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator)]


def _warmed_up(count: int, options: CaptionOptions, step: int, total_steps: int) -> int:
    """How many of `count` tags are used: token_warmup_min at first, growing evenly to all at token_warmup_step."""
    last = options.token_warmup_step
    last = math.floor(last * total_steps) if last < 1 else last
    if step >= last:
        return count
    return options.token_warmup_min + math.floor(step * (count - options.token_warmup_min) / last)


def _with_separator(text: str, options: CaptionOptions) -> str:
    if not options.secondary_separator:
        return text
    return text.replace(options.secondary_separator, options.caption_separator)
