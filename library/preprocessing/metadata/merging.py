"""The texts beside pictures as fields of a metadata file's entries."""

import itertools
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from library import console
from library.bars import progress_bar
from library.console import warn
from library.data.scanning.columns import Texts
from library.data.scanning.files import folder_problem
from library.data.scanning.listing import Listing, list_folder
from library.data.scanning.members import write_members
from library.data.scanning.reading import in_chunks, read_caption
from library.data.scanning.sources import CAPTION_EXTENSIONS
from library.data.scanning.wording import counted
from library.errors import UserError, some
from library.options.merge_metadata import MergeCaptionsOptions
from library.preprocessing.metadata.file import MetadataFile, check_input, check_output, warn_of_losses
from library.preprocessing.metadata.keys import Keys
from library.preprocessing.pictures import folders, no_pictures, with_dot
from library.preprocessing.tally import Tally


@dataclass(frozen=True)
class Kind:
    """What is merged."""

    field: str
    """of an entry"""
    one: str
    more: str
    made_of: Callable[[str], str]
    """The field's value from the lines of a file."""


def joined_lines(text: str) -> str:
    """The lines that are not blank: an entry's caption may have several."""
    return "\n".join(line for line in text.split("\n") if line)


def joined_tags(text: str) -> str:
    """The lines as one list of tags: they may be written one a line."""
    return ", ".join(tags for line in text.split("\n") if (tags := line.strip(", \t")))


CAPTIONS = Kind("caption", "caption", "captions", joined_lines)
TAGS = Kind("tags", "list of tags", "lists of tags", joined_tags)


@dataclass
class FoundTexts:
    """The pictures of a folder that have a text."""

    pictures: list[str]
    texts: Texts
    """Of each picture, in the same order; none where its file cannot be read or is empty"""
    unreadable: list[str] = field(default_factory=list)
    without: int = 0
    """How many other pictures there are."""


def merge_texts(options: MergeCaptionsOptions, kind: Kind) -> None:
    """Write the metadata file that `options` ask for, and say what is in it. Raises UserError if there is nothing to
    merge, and if a file is not what it should be; then nothing is written.
    """
    source, target = options.in_json, options.out_json
    extension = with_dot(options.caption_extension)
    if problem := folder_problem(options.train_data_dir):
        raise UserError(f"train_data_dir: {problem}")
    if source is not None:
        check_input("--in_json", source)
    check_output("out_json", target)
    if source is None and target.exists():
        console.notice(f"{target} exists, and its entries are kept and added to")
        source = target
    known = MetadataFile(source)
    found = find_texts(options.train_data_dir, extension, options.recursive, kind)
    keys = Keys(found.pictures, full_path=options.full_path)
    _report_sharing(keys)
    if source is not None:
        warn_of_losses(target, known, but=lambda key: keys.row(key) is not None)
    merge = _Merge(found, keys, kind, debug=options.debug)
    with closing(merge.entries(known)) as entries:
        write_members(target, entries)
    if merge.otherwise:
        _report_otherwise(merge.otherwise, known, options.full_path)
    Tally(merge.written, merge.same, list(map(Path, found.unreadable))).tell(kind.more)
    print(f"{target}: {merge.summary(kind)}")
    if found.without:
        print(f"{counted(found.without, 'picture has', 'pictures have')} no {extension} file")


def find_texts(folder: Path, extension: str, recursive: bool, kind: Kind) -> FoundTexts:
    """The pictures in a folder, and in those below it, with the texts of their files. Says which files are not used and
    which may not be what was meant. UserError if there are no pictures, or no texts for them.
    """
    listings = [list_folder(Path(place), extension) for place, _ in folders(folder, recursive)]
    number = sum(len(listing.images) for listing in listings)
    if not number:
        raise no_pictures("train_data_dir", folder, recursive)
    pictures, files, missing = [], [], []
    stray: list[str] = []
    for listing in listings:
        place, stems = os.fspath(listing.folder), listing.stems
        for name, stem in zip(listing.images, stems, strict=True):
            if stem in listing.captions:
                pictures.append(os.path.join(place, name))
                files.append(os.path.join(place, stem + extension))
            else:
                missing.append((listing, stem))
        stray += [os.path.join(place, stem + extension) for stem in sorted(listing.captions.keys() - set(stems))]
    if stray:
        are = counted(len(stray), f"{extension} file has", f"{extension} files have")
        warn(f"{folder}: {are} no picture and {'is' if len(stray) == 1 else 'are'} not used: {some(stray)}")
    _report_missing(folder, extension, number, missing)
    texts, unreadable = _read(folder, files, kind)
    if texts.lengths.max() < 0:
        raise UserError(f"{folder}: none of the {extension} files can be read and holds a text: {some(files)}")
    return FoundTexts(pictures, texts, unreadable, len(missing))


def _report_missing(folder: Path, extension: str, number: int, missing: Sequence[tuple[Listing, str]]) -> None:
    """Says if texts may have been overlooked. UserError if there are none."""
    counts = {end: sum(stem + end in listing.others for listing, stem in missing) for end in CAPTION_EXTENSIONS}
    other, count = max(counts.items(), key=lambda item: item[1])
    have = f"{count} of the {counted(number, 'picture', 'pictures')} in {folder} {'has' if count == 1 else 'have'}"
    have += f" a {other} file and no {extension} file"
    if len(missing) == number:
        if count:
            raise UserError(f"{have}: if that is what is to be merged, add --caption_extension {other}")
        raise UserError(f"{folder}: there is no {extension} file for any of the pictures ({number})")
    if count:
        warn(f"{have}: the {other} files are not used")


def _read(folder: Path, files: list[str], kind: Kind) -> tuple[Texts, list[str]]:
    """(the texts of files, none of those that are empty, and the names of those that cannot be read)"""
    blob, lengths = bytearray(), array("i")
    unreadable, unusual, empty = [], [], []
    answers = itertools.chain.from_iterable(in_chunks(lambda some_files: list(map(read_caption, some_files)), files))
    bar = progress_bar(files, desc=f"reading {kind.more}", unit="file", delay=1, leave=False)
    for file, caption in zip(bar, answers, strict=True):
        text = kind.made_of((caption.text or b"").decode()).encode()
        blob += text
        lengths.append(len(text) or -1)
        if caption.text is None:
            unreadable.append(file)
        elif not text:
            empty.append(file)
        if caption.unusual:
            unusual.append(file)
    for names, one, more in (
        (unreadable, "file cannot be read and is left out", "files cannot be read and are left out"),
        (unusual, "file is not UTF-8 and is read as Latin-1", "files are not UTF-8 and are read as Latin-1"),
        (empty, "file is empty and left out", "files are empty and left out"),
    ):
        if names:
            warn(f"{folder}: {counted(len(names), one, more)}: {some(names)}")
    return Texts.packed(blob, np.array(lengths, dtype=np.int32)), unreadable


class _Merge:
    """The entries of a file with the texts found, and how many of them are what."""

    def __init__(self, found: FoundTexts, keys: Keys[str], kind: Kind, *, debug: bool):
        self.found = found
        self.keys = keys
        self.field = kind.field
        self.debug = debug
        self.kept = self.same = self.filled = self.replaced = self.new = 0
        self.otherwise: list[str] = []
        """The first names that are no paths where pictures are named by their paths, or the other way round."""

    @property
    def written(self) -> int:
        """How many entries have another text than before."""
        return self.filled + self.replaced + self.new

    def entries(self, known: MetadataFile) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those of the file in its order, then those of pictures that it does not have."""
        done = bytearray(len(self.found.pictures))
        total = len(known) + len(done)
        with progress_bar(total=total, desc="writing entries", unit="entry", delay=1, leave=False) as bar:
            for key, entry in known:
                row = self.keys.row(key)
                if bool(os.path.dirname(key)) != self.keys.full_path:
                    self.otherwise.append(key)
                if row is None or self.found.texts.lengths[row] < 0:
                    self.kept += 1
                else:
                    done[row] = True
                    self._merge(key, entry, self.found.texts[row])
                yield key, entry
                bar.update()
            for row, picture in enumerate(self.found.pictures):
                bar.update()
                key = self.keys.new(picture)
                if done[row] or self.found.texts.lengths[row] < 0 or self.keys.row(key) != row:
                    continue  # the last: their names look the same, and no key means this one
                self.new += 1
                text = self.found.texts[row]
                self._show(key, text, "")
                yield key, {self.field: text}

    def _merge(self, key: str, entry: dict[str, Any], text: str) -> None:
        before = entry.get(self.field)
        if before == text:
            self.same += 1
        elif before:
            self.replaced += 1
        else:
            self.filled += 1
        self._show(key, text, f" in place of {before!r}" if before and before != text else "")
        entry[self.field] = text

    def _show(self, key: str, text: str, before: str) -> None:
        if self.debug:
            with console.long_list():
                print(f"{key!r}: {text!r}{before}")

    def summary(self, kind: Kind) -> str:
        """How many entries there are, of which kinds."""
        total = self.kept + self.same + self.written
        return (
            f"{counted(total, 'entry', 'entries')}: {self.new} new, {self.replaced} with another {kind.one} than "
            f"before, {self.filled} that had none, {self.same + self.kept} as they were"
        )


def _report_sharing(keys: Keys[str]) -> None:
    """Says which pictures are told apart by their endings only."""
    if sharing := keys.sharing:
        count = counted(len(sharing), "picture has", "pictures have")
        warn(f"{count} the name of another one but for the ending, and its text, too: {some(sharing)}")


def _report_otherwise(names: list[str], known: MetadataFile, full_path: bool) -> None:
    """Says what it means that pictures are named by their paths and without."""
    entries = f"{len(names)} of the {counted(len(known), 'entry', 'entries')}"
    if full_path:
        how, remedy = "without a folder, and --full_path with it", "leave --full_path out"
    else:
        how, remedy = "with its folder, and without --full_path by its name alone", "add --full_path"
    warn(
        f"{known.path}: {entries} name a picture {how}: the same picture has two entries then; if that is not meant, "
        f"begin again from the old file and {remedy}: {some(names)}"
    )
