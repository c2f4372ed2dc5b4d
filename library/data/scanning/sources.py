"""The images of one subset: those in its folder, or those in its metadata file."""

import itertools
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from library.bars import progress_bar
from library.console import rank, warn
from library.data.caching.npz import read_arrays
from library.data.config import SubsetConfig
from library.data.images import BrokenImage
from library.data.scanning import index
from library.data.scanning.columns import Texts
from library.data.scanning.files import is_image
from library.data.scanning.index import NO_FACTS, Facts
from library.data.scanning.listing import Listing, list_folder, normalised
from library.data.scanning.metadata import Entry, read_metadata
from library.data.scanning.reading import in_chunks, read_caption, read_header
from library.data.scanning.wording import counted
from library.errors import UserError, some

CAPTION_EXTENSIONS = (".txt", ".caption", ".tags")  # what captions are usually found in


@dataclass
class Found:
    """The N readable images of a subset, sorted by their normalised names."""

    root: str
    """The folder that the names are relative to."""
    names: list[str]
    facts: Facts
    shared_stem: np.ndarray
    """(N,) whether another image of its folder has the same stem, or has it as its name"""
    full_stem: np.ndarray
    """(N,) whether its caches are named after its full name"""
    resolutions: np.ndarray | None = None
    """(N, 2) train_resolution of a metadata file, 0 where it has none; None for a folder"""
    without_resolution: str = ""
    """The first image without train_resolution."""
    only_latents: np.ndarray | None = None
    """(N,) whether the image is gone but its latents are there; None: none of them"""
    captions_missing: int = 0
    captions_without_image: int = 0
    broken: list[str] = field(default_factory=list)
    """Names of what cannot be read."""


def in_folder(subset: SubsetConfig) -> Found:
    """The images in a DreamBooth subset's folder, with the texts of their caption files.

    What cannot be read is left out with a warning. Raises UserError if captions lie beside the images under another
    extension than chosen.
    """
    folder, legacy = subset.image_dir, subset.images.legacy_image_decode
    try:
        listing = list_folder(folder, subset.caption_extension, stamps=subset.cache_info)
    except OSError as problem:
        warn(f"{folder}: the folder cannot be read and is left out ({problem.strerror})")
        return Found(os.fspath(folder), [], NO_FACTS, np.empty(0, bool), np.empty(0, bool))
    if not listing.images:
        warn(f"{folder}: no images in it, the folder is left out")
    known, rows = NO_FACTS, np.full(len(listing.images), -1)
    if subset.cache_info:
        known, rows = index.load(listing, legacy)
    fresh = np.flatnonzero(rows < 0).tolist()
    names, captions = [listing.images[row] for row in fresh], [listing.caption_of(row) for row in fresh]
    read, broken = _read(subset, os.fspath(folder), names, captions, of=len(listing.images))
    sound = [row for row, name in zip(fresh, names, strict=True) if name not in broken]
    rows[sound] = len(known.sizes) + np.arange(len(sound))
    used = np.flatnonzero(rows >= 0)
    facts = known.joined(read).take(rows[used])
    if subset.cache_info and (sound or len(known.sizes) != len(used)):
        index.save(listing, used, facts, legacy)
    _report_captions(subset, listing, facts, used)
    return Found(
        root=os.fspath(folder),
        names=[listing.images[row] for row in used.tolist()],
        facts=facts,
        shared_stem=listing.shared_stems[used],
        full_stem=listing.full_stems[used],
        captions_missing=int((facts.captions.lengths < 0).sum()),
        captions_without_image=_report_stray_captions(listing),
        broken=list(broken),
    )


def _read(
    subset: SubsetConfig, root: str, names: list[str], captions: list[str], *, of: int
) -> tuple[Facts, dict[str, str]]:
    """The facts of the images that can be read, in order, and what is wrong with the others, by name.

    `of` is how many images there are, for messages: some may be known.
    """
    legacy = subset.images.legacy_image_decode

    def read_all(numbers: range) -> list:
        return [read(number) for number in numbers]

    def read(number: int):
        try:
            size, animated = read_header(os.path.join(root, names[number]), legacy=legacy)
        except BrokenImage as problem:
            return str(problem)
        return size, animated, read_caption(os.path.join(root, captions[number])) if captions[number] else None

    sizes, animated, unusual = array("i"), array("b"), array("b")
    lengths, blob = array("i"), bytearray()
    broken: dict[str, str] = {}
    silent: list[str] = []
    jobs = range(len(names))
    answers = itertools.chain.from_iterable(in_chunks(read_all, jobs))
    bar = progress_bar(jobs, desc=f"reading {subset.name}", unit="img", delay=1, leave=False, disable=rank() > 0)
    for number, answer in zip(bar, answers, strict=True):
        if isinstance(answer, str):
            broken[names[number]] = answer
            continue
        size, is_animated, caption = answer
        sizes.extend(size)
        animated.append(is_animated)
        unusual.append(caption is not None and caption.unusual)
        lengths.append(len(caption.text) if caption and caption.text is not None else -1)
        if lengths[-1] > 0:
            blob += caption.text
        if caption and caption.text is None:
            silent.append(captions[number])
    if broken:
        are = "is" if len(broken) == 1 else "are"
        named = some([f"{name} ({reason})" for name, reason in broken.items()])
        warn(f"{root}: {len(broken)} of {of} images cannot be read and {are} left out: {named}")
    if silent:
        count = counted(len(silent), "caption cannot be read and counts", "captions cannot be read and count")
        warn(f"{root}: {count} as missing: {some(silent)}")
    columns = (np.frombuffer(column, dtype=bool) for column in (animated, unusual))
    texts = Texts.packed(blob, np.array(lengths, dtype=np.int32))
    return Facts(np.array(sizes, dtype=np.int32).reshape(-1, 2), *columns, texts), broken


def _report_captions(subset: SubsetConfig, listing: Listing, facts: Facts, used: np.ndarray) -> None:
    """Says which captions may not be what was meant. UserError where all captions have another ending."""
    unusual = [listing.caption_of(row) for row in used[facts.unusual].tolist()]
    if unusual:
        count = counted(len(unusual), "caption is not UTF-8 and is", "captions are not UTF-8 and are")
        warn(f"{subset.image_dir}: {count} read as Latin-1: {some(unusual)}")
    missing = [listing.stems[row] for row in used[facts.captions.lengths < 0].tolist()]
    counts = {end: sum(stem + end in listing.others for stem in missing) for end in CAPTION_EXTENSIONS}
    extension, count = max(counts.items(), key=lambda item: item[1])
    if not count or not subset.caption_extension:  # "": class_tokens are the captions
        return
    # They are more likely overlooked than not wanted.
    have = "has" if count == 1 else "have"
    found = f"{count} of the {len(used)} images {have} a {extension} file and no {subset.caption_extension} file"
    if len(missing) < len(used) or subset.is_reg:
        warn(f"{subset.image_dir}: {found}: the {extension} files are not used")
        return
    raise UserError(f"{subset.image_dir}: {found}: {_caption_advice(subset, extension)}")


def _caption_advice(subset: SubsetConfig, extension: str) -> str:
    """What to do about captions that have this extension only."""
    if not subset.place:
        return f"use --caption_extension {extension}"
    if subset.is_preserved or subset.caption_extension not in CAPTION_EXTENSIONS:
        # An ending of its own is for captions of another kind: those beside them are the wrong ones.
        return (
            f'write the {subset.caption_extension} files, or set caption_extension = "" in {subset.place}, so that its '
            "class_tokens are the captions"
        )
    return f'set caption_extension = "{extension}" in {subset.place}, or use --caption_extension {extension}'


def _report_stray_captions(listing: Listing) -> int:
    """How many captions have no image."""
    if len(np.unique(listing.caption_rows)) - bool((listing.caption_rows < 0).any()) == len(listing.captions):
        return 0
    stray = sorted(listing.captions.keys() - set(listing.stems))
    if stray:
        named = some([stem + listing.caption_extension for stem in stray])
        warn(f"{listing.folder}: {counted(len(stray), 'caption has', 'captions have')} no image: {named}")
    return len(stray)


def in_metadata(subset: SubsetConfig) -> Found:
    """The images that a fine-tuning subset's metadata file names, with its captions.

    An entry whose image is gone is left out with a warning, unless latents made by prepare_buckets_latents are there
    and the entry has the train_resolution they were made for. Raises UserError for a file that cannot be understood.
    """
    entries = _Entries(subset)
    for entry in read_metadata(subset.metadata_file):
        entries.add(entry)
    return entries.found()


class _Entries:
    """Collects the entries of a metadata file in compact form, by the images they name."""

    def __init__(self, subset: SubsetConfig):
        self.subset = subset
        self.listings: dict[str, Listing | None] = {}
        self.shared: dict[str, set[str]] = {}
        self.full: dict[str, set[str]] = {}
        self.folders: dict[str, int] = {}
        self.names: list[str] = []
        self.folder_of, self.lengths, self.resolutions = array("i"), array("i"), array("i")
        self.only_latents, self.shared_stem, self.full_stem = array("b"), array("b"), array("b")
        self.blob = bytearray()
        self.missing: list[str] = []

    def add(self, entry: Entry) -> None:
        """Looks for the entry's image."""
        folder, base = os.path.split(os.path.join(self.subset.image_dir or "", entry.key))
        listing = self._listing(folder)
        name = listing and listing.find(base)
        latents = ""
        if not name and listing and entry.train_resolution:
            name = latents = _image_of_latents(listing, base)
        if not name:
            self.missing.append(entry.key)
            return
        self.names.append(name)
        self.folder_of.append(self.folders.setdefault(folder, len(self.folders)))
        self.lengths.append(-1 if entry.caption is None else len(entry.caption))
        self.blob += entry.caption or b""
        self.resolutions.extend(entry.train_resolution or (0, 0))
        self.only_latents.append(bool(latents))
        # latents whose image is gone may be those of an image with the same stem
        shared = bool(listing.find(os.path.splitext(name)[0])) if latents else name in self.shared[folder]
        self.shared_stem.append(shared)
        self.full_stem.append(name in self.full[folder])

    def _listing(self, folder: str) -> Listing | None:
        if folder not in self.listings:
            try:
                listing = list_folder(Path(folder))
            except (OSError, ValueError):  # no such folder, or no name that one could have
                self.listings[folder] = None
            else:
                self.listings[folder] = listing
                self.shared[folder] = {listing.images[i] for i in np.flatnonzero(listing.shared_stems).tolist()}
                self.full[folder] = {listing.images[i] for i in np.flatnonzero(listing.full_stems).tolist()}
        return self.listings[folder]

    def found(self) -> Found:
        """All of them, sorted, with the sizes of the images."""
        self._report_missing()
        self.listings.clear()
        root, prefixes = self._places()
        names = [prefixes[folder] + name for folder, name in zip(self.folder_of, self.names, strict=True)]
        order = self._order(names)
        names = [names[row] for row in order.tolist()]
        only_latents = np.array(self.only_latents, dtype=bool)[order]
        resolutions = np.array(self.resolutions, dtype=np.int32).reshape(-1, 2)[order]
        captions = Texts.packed(self.blob, np.array(self.lengths, dtype=np.int32)).take(order)
        facts, broken, sound = self._sizes(root, names, only_latents, resolutions)
        # an image that cannot be read needs no size
        without = sound[resolutions[sound, 0] == 0]
        return Found(
            root=root,
            names=[names[row] for row in sound.tolist()],
            facts=Facts(facts.sizes, facts.animated, facts.unusual, captions.take(sound)),
            shared_stem=np.array(self.shared_stem, dtype=bool)[order][sound],
            full_stem=np.array(self.full_stem, dtype=bool)[order][sound],
            resolutions=resolutions[sound],
            without_resolution=names[without[0]] if len(without) else "",
            only_latents=only_latents[sound],
            captions_missing=int((captions.take(sound).lengths < 0).sum()),
            broken=broken,
        )

    def _places(self) -> tuple[str, list[str]]:
        """The folder that names are relative to, and what each folder adds to it."""
        folders = [os.path.abspath(folder) for folder in self.folders]
        own = self.subset.image_dir
        try:
            root = os.path.abspath(own) if own else os.path.commonpath(folders or [""])
            relative = [os.path.relpath(folder, root) for folder in folders]
        except ValueError:  # on several drives
            root, relative = "", folders
        return root, ["" if folder == "." else os.path.join(folder, "") for folder in relative]

    def _order(self, names: list[str]) -> np.ndarray:
        """The rows sorted by name; of several entries for one image the last."""
        order = sorted(range(len(names)), key=lambda row: normalised(names[row]))
        last = [row for row, after in itertools.pairwise(order) if names[row] != names[after]] + order[-1:]
        if len(last) < len(order):
            count = len(order) - len(last)
            warn(f"{self.subset.metadata_file}: {count} entries name an image that a later entry names, too")
        return np.array(last, dtype=np.int64)

    def _sizes(
        self, root: str, names: list[str], only_latents: np.ndarray, resolutions: np.ndarray
    ) -> tuple[Facts, list[str], np.ndarray]:
        """(facts, broken names, the rows that are in the facts)"""
        there = np.flatnonzero(~only_latents)
        with_image = [names[row] for row in there.tolist()]
        facts, broken = _read(self.subset, root, with_image, [""] * len(with_image), of=len(with_image))
        sound = np.array([name not in broken for name in with_image], dtype=bool)
        sizes = np.zeros((len(names), 2), dtype=np.int32)
        animated = np.zeros(len(names), dtype=bool)
        sizes[there[sound]], animated[there[sound]] = facts.sizes, facts.animated
        for row in np.flatnonzero(only_latents).tolist():
            sizes[row] = _original_size(os.path.join(root, names[row])) or resolutions[row]
        rows = np.flatnonzero(sizes[:, 0])
        unusual = np.zeros(len(rows), dtype=bool)
        return Facts(sizes[rows], animated[rows], unusual, Texts.of([])), list(broken), rows

    def _report_missing(self) -> None:
        if self.missing:
            where = f" in {self.subset.image_dir}" if self.subset.image_dir else ""
            count, total = len(self.missing), len(self.missing) + len(self.names)
            warn(
                f"{self.subset.metadata_file}: {count} of {total} entries have no image{where} and are left out: "
                f"{some(self.missing)}"
            )


def _image_of_latents(listing: Listing, base: str) -> str:
    """The name an image would have that is gone, but not its latents; nothing if they are gone, too."""
    stem, suffix = os.path.splitext(base) if is_image(base) else (base, ".png")
    wanted = normalised(stem) + ".npz"
    if stem.isascii():  # there is only one spelling
        return stem + suffix if wanted in listing.others else ""
    return next((name[:-4] + suffix for name in listing.others if normalised(name) == wanted), "")


def _original_size(image: str) -> tuple[int, int] | None:
    """The image's size as its latents' file tells it."""
    arrays = read_arrays(os.path.splitext(image)[0] + ".npz", ("original_size",)) or {}
    size = arrays.get("original_size")
    known = size is not None and size.shape == (2,) and size.dtype.kind in "iu" and 0 < size.min() <= size.max() < 2**31
    return tuple(size.tolist()) if known else None
