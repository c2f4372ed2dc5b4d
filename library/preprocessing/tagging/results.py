"""Where tags go: into a text file beside each picture, or gathered in one file."""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.data.decode import BrokenImage
from library.data.scanning.members import read_members, write_members
from library.data.scanning.reading import read_caption
from library.errors import UserError
from library.preprocessing.journal import Journal
from library.preprocessing.metadata.keys import Keys
from library.preprocessing.tagging.rules import same
from library.preprocessing.tags import tags_in
from library.preprocessing.text_files import TextFiles, tell_done
from library.replacing import clean_up, replacing


def extended(text: str, names: Iterable[str], separator: str) -> str:
    """A text with those tags added that it does not have; spaces and underscores are alike. One tag a line stays so."""
    lines = text.splitlines()
    between = "\n" if len(lines) > 1 and not any("," in line or separator in line for line in lines) else separator
    there = {same(tag) for tag in tags_in(text, separator)}
    whole = f"{between}{text}{between}"  # a tag may itself hold what tags are separated by
    new = [name for name in names if same(name) not in there and f"{between}{name}{between}" not in whole]
    return between.join([text, *new] if text else new)


class Results(ABC):
    """What is there of each picture, and what comes to it.

    With `append`, names are added to what there is; with `force`, they replace it.
    """

    def __init__(self, separator: str, *, append: bool, force: bool):
        self.separator = separator
        self.append = append
        self.force = force

    def add(self, picture: Path, names: Sequence[str]) -> bool:
        """Take a picture's tags; whether that changes anything. Raises BrokenImage if its file cannot be read, and
        UserError if nothing can be written.
        """
        before = self.text(picture) if self.append else None
        text = self.separator.join(names) if before is None else extended(before, names, self.separator)
        self.put(picture, text, changed=text != before)
        return text != before

    @abstractmethod
    def __enter__(self) -> "Results":
        """At its end what is done is kept for another run."""

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    @property
    def unfinished(self) -> bool:
        """Whether there is something to finish even if no picture is left."""
        return False

    @abstractmethod
    def left(self, pictures: Sequence[Path]) -> list[Path]:
        """The pictures that are to get tags. UserError if nothing can be written for them."""

    @abstractmethod
    def go_on(self, purpose: Mapping[str, Any], pictures: list[Path]) -> list[Path]:
        """The pictures that are left when those are left out that an unfinished run for the same `purpose` has done.
        Before anything is added. UserError if another run is at work.
        """

    @abstractmethod
    def finish(self) -> None:
        """All is done."""

    @abstractmethod
    def text(self, picture: Path) -> str | None:
        """The tags of a picture as they are now; None if there are none. Raises BrokenImage if they cannot be read."""

    @abstractmethod
    def put(self, picture: Path, text: str, *, changed: bool) -> None:
        """Take these tags for a picture."""


class TagFiles(TextFiles, Results):
    """A file beside each picture."""

    def __init__(self, folder: Path, extension: str, separator: str, *, append: bool, force: bool):
        Results.__init__(self, separator, append=append, force=force)
        TextFiles.__init__(self, "tags", folder, extension, again=append or force)

    def text(self, picture: Path) -> str | None:
        file = self.of(picture)
        if not file.exists():
            return None
        text = read_caption(os.fspath(file)).text
        if text is None:
            raise BrokenImage(f"{file} cannot be read")
        return text.decode()

    def put(self, picture: Path, text: str, *, changed: bool) -> None:
        if changed:
            self.write(picture, text)
        self.done(picture)


class GatheredTags(Results):
    """One file for all, which is written at the end; what it says of other pictures stays. Until then a journal has
    what is new, also by runs for other folders.
    """

    def __init__(self, path: Path, pictures: Sequence[Path], separator: str, *, append: bool, force: bool):
        super().__init__(separator, append=append, force=force)
        self.path = path
        self._unfinished = path.with_name(f"{path.name}.unfinished")
        self._journal: Journal | None = None
        self._pictures = pictures
        self._by_path, self._by_name = Keys(pictures, full_path=True), Keys(pictures, full_path=False)
        self._there: dict[str, str] = {}
        if path.parent.is_dir():
            clean_up(path.parent, re.escape(path.name))
        if path.exists():
            for key, text in self.read():
                name = self.name(key)
                if name is not None and isinstance(text, str):
                    self._there[name] = text

    def name(self, key: str) -> str | None:
        """The absolute path of the picture that the file means by a key; None if it is none of these."""
        keys = self._by_path if re.search(r"[/\\]", key) else self._by_name
        picture = keys.picture(key)
        return None if picture is None else os.path.abspath(picture)

    @property
    def unfinished(self) -> bool:
        return self._unfinished.exists()

    def left(self, pictures: Sequence[Path]) -> list[Path]:
        again = self.append or self.force
        return [picture for picture in pictures if again or os.path.abspath(picture) not in self._there]

    def go_on(self, purpose: Mapping[str, Any], pictures: list[Path]) -> list[Path]:
        self._journal = Journal(self._unfinished, purpose, only_copy=True)
        every = dict.fromkeys([*self._pictures, *map(Path, self._journal.done)])
        self._by_path = Keys(list(every), full_path=True)
        left = [picture for picture in pictures if os.path.abspath(picture) not in self._journal.done]
        tell_done(len(pictures) - len(left), "tags")
        return left

    def text(self, picture: Path) -> str | None:
        name = os.path.abspath(picture)
        noted = {} if self._journal is None else self._journal.done
        return noted.get(name, self._there.get(name))

    def put(self, picture: Path, text: str, *, changed: bool) -> None:
        self._journal.note(os.path.abspath(picture), text)

    def finish(self) -> None:
        if self._journal is not None:
            if self._journal.done:
                self.write(self._journal.done)
            self._journal.finish()

    def __enter__(self) -> "GatheredTags":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._journal is not None:
            self._journal.__exit__(*error)

    @abstractmethod
    def read(self) -> Iterator[tuple[str, Any]]:
        """Keys and tags in the file."""

    @abstractmethod
    def write(self, new: Mapping[str, str]) -> None:
        """Replace the file by one with these tags by absolute paths."""


class MetadataTags(GatheredTags):
    """Gathered as fine_tune.py reads metadata: `{"<picture>": {"tags": "..."}}`."""

    def read(self) -> Iterator[tuple[str, Any]]:
        return ((key, entry.get("tags")) for key, entry in read_members(self.path))

    def write(self, new: Mapping[str, str]) -> None:
        write_members(self.path, self._members(dict(new)))

    def _members(self, new: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        seen = set()
        for key, entry in read_members(self.path) if self.path.exists() else ():
            name = self.name(key)
            if name in new:
                seen.add(name)
                entry = {**entry, "tags": new[name]}
            yield key, entry
        yield from ((name, {"tags": text}) for name, text in new.items() if name not in seen)


class LineTags(GatheredTags):
    """Gathered as a line of JSON per picture: `{"image_path": "...", "caption": "..."}`."""

    def read(self) -> Iterator[tuple[str, Any]]:
        return ((entry["image_path"], entry.get("caption")) for entry in self._entries())

    def write(self, new: Mapping[str, str]) -> None:
        with replacing(self.path) as file:
            seen = set()
            for entry in self._entries() if self.path.exists() else ():
                name = self.name(entry["image_path"])
                if name in new:
                    seen.add(name)
                    entry = {**entry, "caption": new[name]}
                file.write(_line(entry))
            for name, text in new.items():
                if name not in seen:
                    file.write(_line({"image_path": name, "caption": text}))

    def _entries(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._entry(number, line)
        except OSError as problem:
            raise UserError(f"{self.path} cannot be read ({problem.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not UTF-8: save it as UTF-8") from None

    def _entry(self, number: int, line: str) -> dict[str, Any]:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("image_path"), str):
                return entry
        raise UserError(f'{self.path}: line {number}: it should look like {{"image_path": "...", "caption": "..."}}')


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, ensure_ascii=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # a file's name may hold what no text can
        return f"{json.dumps(entry)}\n".encode()
