"""The rules by which captions and tags are cleaned, from the file in which users edit them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import UserError, suggest
from library.toml_file import read_toml

_CHAIN = 50  # so many replacements of replacements are none that come to an end

# By sections the keys that they may have; in those without, names are the user's own.
_KEYS: dict[str, tuple[str, ...]] = {
    "": ("tags", "several_people", "captions"),
    "tags": ("underscores_to_spaces", "keep_underscores_in", "end_at", "drop_words_that_end_longer_tags"),
    "several_people": ("when", "one_of_a_kind"),
    "captions": ("replace",),
}


class Tags:
    """Patterns of tags, in which * stands for any text; those that begin with ! are of tags that are not meant."""

    def __init__(self, patterns: Collection[str] = ()):
        meant = [_expression(pattern) for pattern in patterns if not pattern.startswith("!")]
        others = [_expression(pattern[1:]) for pattern in patterns if pattern.startswith("!")]
        but = rf"(?!(?:{'|'.join(others)})\Z)" if others else ""
        self._match = re.compile(f"{but}(?:{'|'.join(meant) or '(?!)'})", re.IGNORECASE).fullmatch

    def __contains__(self, tag: str) -> bool:
        return self._match(tag) is not None


def _expression(pattern: str) -> str:
    return ".*".join(map(re.escape, pattern.strip().split("*")))


class Underscores:
    """Makes spaces of underscores, but for those in the texts that are kept where they are no part of a word."""

    def __init__(self, keep: Collection[str]):
        kept = [
            (r"(?<![^\W_])" if text[0].isalnum() else "")
            + re.escape(text)
            + (r"(?![^\W_])" if text[-1].isalnum() else "")
            for text in sorted(keep, key=len, reverse=True)
        ]
        self._found = re.compile("|".join([*kept, "_"]))

    def __call__(self, tag: str) -> str:
        return self._found.sub(lambda found: " " if found[0] == "_" else found[0], tag)


class Replacements:
    """Words and phrases that are others' stead in captions, as whole words."""

    def __init__(self, becomes: Mapping[str, Collection[str]]):
        """`becomes`: what is replaced, by what it becomes. Raises ValueError if that never comes to an end."""
        self._becomes: dict[str, str] = {}
        for result, phrases in becomes.items():
            for phrase in phrases:
                if self._becomes.setdefault(_plain(phrase), result) != result:
                    raise ValueError(f"{phrase!r} becomes both {self._becomes[_plain(phrase)]!r} and {result!r}")
        longest_first = sorted(self._becomes, key=len, reverse=True)
        phrases = "|".join(" +".join(map(re.escape, phrase.split(" "))) for phrase in longest_first)
        self._found = re.compile(rf"(?<![\w-])(?:{phrases})(?![\w-])" if phrases else r"(?!)", re.IGNORECASE)
        for phrase in self._becomes:
            if self._found.search(self(phrase)):
                raise ValueError(f"{phrase!r} would be replaced again and again")

    def __call__(self, text: str) -> str:
        """The text with all replacements made, also in what has become of others."""
        for _ in range(_CHAIN):
            before, text = text, self._found.sub(self._instead, text)
            if before == text:
                break
        return text

    def _instead(self, found: re.Match[str]) -> str:
        result = self._becomes.get(_plain(found[0]))
        if result is None:
            return found[0]  # the dotless i and its like, which are no other letters' capitals
        if len(found[0]) > 1 and found[0].isupper():
            return result.upper()
        return result[:1].upper() + result[1:] if found[0][0].isupper() else result


def _plain(phrase: str) -> str:
    return " ".join(phrase.casefold().split())


@dataclass(frozen=True)
class Rules:
    """What is done to tags and captions; by default nothing."""

    spaced: Underscores | None = None
    end_at: Tags = field(default_factory=Tags)
    drop_words_that_end_longer_tags: bool = False
    several_people: Tags = field(default_factory=Tags)
    """Tags of which one says that there are several people."""
    kinds: tuple[Tags, ...] = ()
    """Of which several people would have one each."""
    replacements: Replacements = field(default_factory=lambda: Replacements({}))


def read_rules(path: Path) -> Rules:
    """The rules in a file. Raises UserError, naming the file and what is wrong in it."""
    content = read_toml(path, "file of rules")
    tables = {name: _table(path, content, name) for name in _KEYS}
    tags, people = tables["tags"], tables["several_people"]
    kinds = _own_table(path, people, "several_people", "one_of_a_kind")
    replace = _own_table(path, tables["captions"], "captions", "replace")
    try:
        replacements = Replacements(replace)
    except ValueError as problem:
        raise UserError(f"{path}: captions.replace: {problem}") from None
    keep = _texts(path, "tags.keep_underscores_in", tags.get("keep_underscores_in", []))
    return Rules(
        spaced=Underscores(keep) if _switch(path, tags, "underscores_to_spaces") else None,
        end_at=Tags(_texts(path, "tags.end_at", tags.get("end_at", []))),
        drop_words_that_end_longer_tags=_switch(path, tags, "drop_words_that_end_longer_tags"),
        several_people=Tags(_texts(path, "several_people.when", people.get("when", []))),
        kinds=tuple(map(Tags, kinds.values())),
        replacements=replacements,
    )


def _table(path: Path, content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the file, or all of it without a `name`, with no keys but its own."""
    table = content.get(name, {}) if name else content
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name}: must be a section, [{name}]")
    for key in table:
        if key not in _KEYS[name]:
            raise UserError(f"{path}: {f'{name}.' if name else ''}{key}: unknown rule{suggest(key, _KEYS[name])}")
    return table


def _own_table(path: Path, section: Mapping[str, Any], name: str, key: str) -> dict[str, tuple[str, ...]]:
    """Lists of texts by names of the user's own."""
    table = section.get(key, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name}.{key}: must be a section, [{name}.{key}]")
    return {own: _texts(path, f"{name}.{key}.{own}", texts) for own, texts in table.items()}


def _switch(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{path}: tags.{key}: must be true or false, not {value!r}")
    return value


def _texts(path: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f'{path}: {name}: must be a list of texts, ["...", "..."], not {value!r}')
    return tuple(value)
