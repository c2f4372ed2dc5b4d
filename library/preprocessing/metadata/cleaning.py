"""Captions and tags made alike, by rules."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from library import console
from library.bars import progress_bar
from library.console import warn
from library.data.scanning.members import write_members
from library.data.scanning.wording import counted
from library.errors import UserError
from library.preprocessing.metadata.file import MetadataFile, check_input, check_output, warn_of_losses
from library.preprocessing.metadata.rules import Rules
from library.preprocessing.tags import tags_in


def clean_caption(caption: str, rules: Rules) -> str:
    """A caption with its words replaced; its lines stay lines."""
    return rules.replacements(caption)


def clean_tags(text: str, rules: Rules) -> str:
    """A list of tags, separated by commas or lines, without those that the rules have left out; `a, b` in the end.

    Cleaning a second time changes nothing.
    """
    tags = tags_in(text)
    if rules.spaced:
        tags = tags_in(",".join(map(rules.spaced, tags)))
    tags = _until_end(tags, rules)
    if any(tag in rules.several_people for tag in tags):
        for kind in rules.kinds:
            if len({tag.lower() for tag in tags if tag in kind}) > 1:
                tags = [tag for tag in tags if tag not in kind]
    if rules.drop_words_that_end_longer_tags:
        ends = {tag.lower().rpartition(" ")[2] for tag in tags if " " in tag}
        tags = [tag for tag in tags if tag.lower() not in ends]
    return ", ".join(tags)


def _until_end(tags: list[str], rules: Rules) -> list[str]:
    """The tags up to one that ends the list; those of them that lead it only leave it themselves."""
    ends = [tag in rules.end_at for tag in tags]
    start = next((place for place, is_end in enumerate(ends) if not is_end), len(tags))
    stop = next((place for place in range(start, len(tags)) if ends[place]), len(tags))
    return tags[start:stop]


def clean_metadata(source: Path, target: Path, rules: Rules, *, debug: bool = False) -> None:
    """Write a metadata file anew with the captions and tags of all its entries cleaned, and say how many have changed.

    Raises UserError if it cannot be read or written, or has no entries.
    """
    check_input("in_json", source)
    check_output("out_json", target)
    known = MetadataFile(source)
    if not len(known):
        raise UserError(f"{source}: there are no entries in this metadata file, and nothing is written")
    warn_of_losses(target, known)
    cleaning = _Cleaning(rules, debug)
    with closing(cleaning.entries(known)) as entries:
        write_members(target, entries)
    print(
        f"entries: {cleaning.written} cleaned and written, {cleaning.skipped} skipped as they were clean already, "
        f"{cleaning.failed} failed"
    )
    print(
        f"{target}: {counted(len(known), 'entry', 'entries')}, {cleaning.changed['caption']} with another caption and "
        f"{cleaning.changed['tags']} with other tags than before"
    )


class _Cleaning:
    """The entries of a file, cleaned, and how many of them are what."""

    def __init__(self, rules: Rules, debug: bool):
        self.rules = rules
        self.debug = debug
        self.written = self.skipped = self.failed = 0
        self.changed = {"caption": 0, "tags": 0}

    def entries(self, known: MetadataFile) -> Iterator[tuple[str, dict[str, Any]]]:
        with progress_bar(known, total=len(known), desc="cleaning", unit="entry", delay=1, leave=False) as bar:
            for key, entry in bar:
                changed = self._clean(key, entry)
                if wrong := [name for name in self.changed if not isinstance(entry.get(name) or "", str)]:
                    warn(f"{known.path}: {key}: what is no text stays as it is: {' and '.join(wrong)}")
                    self.failed += 1
                elif changed:
                    self.written += 1
                else:
                    self.skipped += 1
                yield key, entry

    def _clean(self, key: str, entry: dict[str, Any]) -> bool:
        """Clean an entry. Whether that has changed anything."""
        changed = False
        for name, clean in (("caption", clean_caption), ("tags", clean_tags)):
            before = entry.get(name)
            if before and isinstance(before, str) and (after := clean(before, self.rules)) != before:
                entry[name] = after
                self.changed[name] += 1
                changed = True
                if self.debug:
                    with console.long_list():
                        print(f"{key!r}: {name}: {before!r} -> {after!r}")
        return changed
