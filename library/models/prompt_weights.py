"""Captions with weights in them, and captions longer than an encoder: pure functions on text and token ids.

`(x)` weighs x by 1.1, `[x]` by 1/1.1 and `(x:1.3)` by 1.3; nested weights multiply. A backslash takes its meaning from
a bracket or a backslash behind it, and stands for itself elsewhere. A bracket that is never closed reaches to the end
of the caption; one that was never opened is a character like others.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

Value = TypeVar("Value", int, float)

BEGIN, END = 49406, 49407
CHUNK = 75  # tokens between begin and end in one pass through the encoder

_ROUND, _SQUARE = 1.1, 1 / 1.1
_MARKS = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | (?P<opening>[(\[])
    | :\s*(?P<weight>[+-]?(?:[0-9]{1,9}\.?[0-9]*|\.[0-9]+))\s*\)
    | (?P<closing>[)\]])
    """,
    re.VERBOSE,
)


def split_weights(caption: str) -> list[tuple[str, float]]:
    """The caption in pieces of equal weight, without the brackets and numbers that say so; one piece if it has none."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the pieces that open brackets start with

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    done = 0
    for mark in _MARKS.finditer(caption):
        if mark.start() > done:
            pieces.append((caption[done : mark.start()], 1.0))
        done = mark.end()
        if mark["opening"]:
            opened[mark["opening"]].append(len(pieces))
        elif mark["weight"] and opened["("]:
            weigh(opened["("].pop(), float(mark["weight"]))
        elif mark["closing"] == ")" and opened["("]:
            weigh(opened["("].pop(), _ROUND)
        elif mark["closing"] == "]" and opened["["]:
            weigh(opened["["].pop(), _SQUARE)
        else:
            pieces.append((mark["escaped"] or mark[0], 1.0))
    if done < len(caption):
        pieces.append((caption[done:], 1.0))
    for start in opened["("]:
        weigh(start, _ROUND)
    for start in opened["["]:
        weigh(start, _SQUARE)
    # neighbours of one weight are one piece: a word may go on after an escaped bracket
    groups = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), weight) for weight, group in groups] or [("", 1.0)]


def chunks(ids: Sequence[int], length: int = CHUNK, pad: int = END) -> list[list[int]]:
    """A caption's ids, cut off at `length` (a multiple of 75), as rows of 77 for one pass through the encoder each.

    Every row has 75 of them between begin and end; what is left of it is `pad`.
    """
    return [_row(ids[start : start + CHUNK], BEGIN, END, pad) for start in range(0, length, CHUNK)]


def weight_chunks(weights: Sequence[float], length: int = CHUNK) -> list[list[float]]:
    """The weights of a caption's ids in the same rows; begin, end and padding weigh 1."""
    return [_row(weights[start : start + CHUNK], 1.0, 1.0, 1.0) for start in range(0, length, CHUNK)]


def _row(own: Sequence[Value], begin: Value, end: Value, pad: Value) -> list[Value]:
    row = [begin, *own, end]
    return row + [pad] * (CHUNK + 2 - len(row))
