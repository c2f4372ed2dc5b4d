"""Remarks on writing in a picture, which some captioners make of any pattern: `a mug with the words " hello " on it`.

What is removed, in capital and small letters alike:

1. words in quotes, with what leads to them and says where they stand: `with the words "..." on it`, `that says "..."`,
   `called '...' and "..."`; a double quote that is not closed goes on to the end;
2. words without quotes, if the caption calls them so: `with the word love on the cover`, `with the number 23 on her
   shirt`, `and some letters in the corner`; where no place is named, what comes before the next comma. What only has
   such a word in its name stays: `with number plates`, `with a name tag`;
3. one word without quotes after `that says`.
"""

import re

_THE = r"(?:the|its|his|her|their|some)"
_WITH = r"(?:(?:and|with|that|which|has|having|showing|featuring|displaying|bearing|containing)\s+)"
_WORDS = (
    r"(?:words?|texts?|letters?|numbers?(?!\s+of\b)|numerals?|names?(?!\s+tag)|title|inscription|phrase|slogan|writing)"
)
_SAYS = r"(?:(?:that|which|and)\s+)?(?:says?|saying|reads?|reading|spells?|called|titled|entitled|named)"
_THING = r"\s+(?:tags?|plates?|messages?|pages?|books?|box(?:es)?|openers?)\b"  # named with such a word: no remark
# without quotes, words follow only these, and figures the last: `with writing desks in the room` is no remark
_NAMES = r"(?:words?|text|letters?|numbers?(?!\s+of\b)|numerals?|names?|title|inscription|phrase|slogan)"
_NAMED = rf"(?:words\b|{_THE}\s+{_NAMES}\b(?!{_THING})|numbers?\s+\d)"
_AT = r"\s*\b(?:on|in|at|across|above|below|under)\s+"
_SIDE = r"(?:it|them|top|the\s+(?:front|back|top|bottom|side|left|right|corner|middle|center))\b"
_PLACE = rf"(?:{_SIDE}|(?:an?|{_THE})\s+[\w-]+)(?:\s+of\s+(?:it|them|(?:a|an|the)\s+[\w-]+))?"
_QUOTED = r"""(?:"[^"]*(?:"|$)|“[^”]*(?:”|$)|(?<!\w)'[^']+'(?!\w))"""
_SEVERAL = rf"{_QUOTED}(?:(?:\s|,|\band\b|\bor\b)*{_QUOTED})*"

_RULES = tuple(
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"(?:,\s*)?\b{_WITH}{{0,3}}(?:(?:an?|{_THE})\s+)?{_WORDS}(?:\s+{_SAYS}|\s+of)?\s*[,:]?\s*{_SEVERAL}(?:{_AT}{_PLACE})?",
        rf"(?:,\s*)?(?:\b(?:{_SAYS}|with|and)\s*[,:]?\s*)?{_SEVERAL}(?:{_AT}{_SIDE})?",
        rf"(?:,\s*)?\b{_WITH}{{1,3}}{_NAMED}(?:(?!{_AT})\s*[^\s,.]+)*(?:{_AT}{_PLACE})?",
        rf"(?:,\s*)?\b{_WITH}{{1,3}}(?:{_THE}\s+)?{_WORDS}(?:{_AT}{_PLACE}|(?=\s*(?:[,.]|$)))",
        rf"\s*\b(?:that|which)\s+says?\s+[\w'-]+(?:{_AT}{_SIDE})?",
    )
)


def without_remarks(caption: str) -> str:
    """The caption without what it says of writing in the picture; empty if it speaks of nothing else."""
    caption = " ".join(caption.split())
    for rule in _RULES:
        caption = rule.sub(" ", caption)
    return re.sub(r"\s+(?=[,.])", "", " ".join(caption.split())).strip(" ,")
