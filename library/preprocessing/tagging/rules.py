"""From the probabilities that a tagger gives to the names that are written: pure functions."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.console import notice, warn
from library.errors import UserError, some, suggest
from library.options.tag_images import TagImagesOptions

GENERAL, CHARACTER, RATING, QUALITY = "general", "character", "rating", "quality"
_NUMBERS = {"0": GENERAL, "1": "artist", "3": "copyright", "4": CHARACTER, "5": "meta", "9": RATING}
_CATEGORIES = {*_NUMBERS.values(), QUALITY, "model"}
_SHORT = 3  # a name of so many characters may be a face, as ^_^


class Tag(NamedTuple):
    """What one number of a tagger's output is the probability of."""

    name: str
    category: str


def read_tags(path: Path) -> list[Tag]:
    """The tags of a tagger's selected_tags.csv, in the order of its outputs.

    Its columns `name` and `category` count; categories are Danbooru's numbers, 9 for ratings, or names. UserError if
    it cannot be read or lacks a column.
    """
    tags, unknown = [], set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if missing := {"name", "category"}.difference(rows.fieldnames or ()):
                raise UserError(f"{path}: this list of tags has no column {some(sorted(missing))}")
            for row in rows:
                name, category = (row["name"] or "").strip(), (row["category"] or "").strip().lower()
                if not name or not category:
                    raise UserError(f"{path}: line {rows.line_num}: a tag has a name and a category")
                category = _NUMBERS.get(category, category)
                if category not in _CATEGORIES:
                    unknown.add(category)
                    category = GENERAL
                tags.append(Tag(name, category))
    except OSError as problem:
        raise UserError(f"{path}: this list of tags cannot be read ({problem.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path}: this list of tags is no CSV file in UTF-8 ({problem})") from None
    if not tags:
        raise UserError(f"{path}: there are no tags in this list")
    if unknown:
        notice(f"{path}: tags of the unknown category {some(sorted(unknown))} count as general ones")
    return tags


def same(name: str) -> str:
    """What two spellings of a tag have in common: spaces and underscores are alike."""
    return "_".join(name.replace("_", " ").split()) or name


def without_underscores(name: str) -> str:
    """A tag with spaces, unless it may be a face."""
    return name.replace("_", " ") if len(name) > _SHORT else name


def expanded(name: str) -> list[str]:
    """A character's tag, `name_(series)`, in two; one that is not written so as it is."""
    start, bracket, series = name.rpartition("(")
    start, series = start.rstrip("_ "), series.removesuffix(")")
    return [start, series] if bracket and name.endswith(")") and start and series else [name]


class TagRules:
    """Which of a tagger's tags are written, how, and in which order, as the options say."""

    def __init__(self, tags: Sequence[Tag], options: TagImagesOptions):
        self.tags = tags
        self.options = options
        self._replacements = {same(old): new for old, new in options.replacements.items()}
        self._undesired = {same(name) for name in options.names(options.undesired_tags)}
        self._first = [same(name) for name in options.names(options.always_first_tags or "")]
        self._written = [self._spelled(tag) for tag in tags]
        # in the model's own precision: its 0.35 is to reach a threshold of 0.35
        self._thresholds = np.array([self._threshold(tag.category) for tag in tags], np.float32)
        self._in = {
            category: np.array([number for number, tag in enumerate(tags) if tag.category == category], int)
            for category in _CATEGORIES
        }
        self._tell_unknown()

    def chosen(self, probabilities: np.ndarray) -> np.ndarray:
        """The numbers of the tags whose probabilities (T,) reach their thresholds, in the model's order; ratings and
        qualities are not among them.
        """
        return np.flatnonzero(probabilities >= self._thresholds)

    def best(self, category: str, probabilities: np.ndarray) -> int | None:
        """The number of the most probable tag of a category; None if the model knows none."""
        members = self._in[category]
        return int(members[probabilities[members].argmax()]) if len(members) else None

    def names(self, probabilities: np.ndarray) -> list[str]:
        """What is written of a picture with these probabilities (T,), each name once.

        In the order of the model's list: first what is always first, then rating and quality if they are wanted there,
        then characters if they are; rating and quality at the end if they are wanted there.
        """
        options = self.options
        numbers = self.chosen(probabilities).tolist()
        if options.character_tags_first:
            numbers.sort(key=lambda number: self.tags[number].category != CHARACTER)
        before, after = [], []
        for category, first, last in (
            (RATING, options.use_rating_tags, options.use_rating_tags_as_last_tag),
            (QUALITY, options.use_quality_tags, options.use_quality_tags_as_last_tag),
        ):
            number = self.best(category, probabilities)
            if (first or last) and number is not None:
                (after if last else before).append(number)
        names = [name for number in (*before, *numbers, *after) for name in self._written[number]]
        first = [name for wanted in self._first for name in names if same(name) == wanted]
        return list(dict.fromkeys([*first, *names]))

    def _threshold(self, category: str) -> float:
        if category in (RATING, QUALITY):
            return np.inf
        own = getattr(self.options, f"{category}_threshold")
        return self.options.thresh if own is None else own

    def _spelled(self, tag: Tag) -> list[str]:
        """What is written of a tag. A whole name is looked up before it is expanded, its parts after that."""
        if same(tag.name) in self._replacements:
            names = [self._replacements[same(tag.name)]]
        elif same(tag.name) in self._undesired:
            names = []
        else:
            expand = self.options.character_tag_expand and tag.category == CHARACTER
            parts = expanded(tag.name) if expand else [tag.name]
            spell = without_underscores if self.options.remove_underscore else str
            names = [self._replacements.get(same(part), spell(part)) for part in parts]
        return [name for name in names if same(name) not in self._undesired]

    def _tell_unknown(self) -> None:
        """Say which of the user's tags are no tags of this model, so that a misspelt one does not go unnoticed."""
        there = {same(tag.name) for tag in self.tags}
        if self.options.character_tag_expand:
            characters = (tag.name for tag in self.tags if tag.category == CHARACTER)
            there.update(same(part) for name in characters for part in expanded(name))
        _tell("--tag_replacement", self._replacements, there)
        there.update(map(same, self._replacements.values()))
        _tell("--undesired_tags", sorted(self._undesired), there)
        _tell("--always_first_tags", self._first, there)


def _tell(flag: str, names: Iterable[str], there: set[str]) -> None:
    for name in names:
        if name not in there:
            warn(f"{flag}: {name} is no tag of this model{suggest(name, there)}")
