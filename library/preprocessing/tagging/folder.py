"""Tags for a folder of pictures."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from library.data.augment import resize
from library.data.decode import BrokenImage, decode
from library.options.tag_images import METADATA, TagImagesOptions
from library.options.work import WorkOptions
from library.preprocessing.pictures import find_pictures, with_dot, with_files_of_their_own
from library.preprocessing.tagging.files import MODEL, TAGS, find_tagger
from library.preprocessing.tagging.results import LineTags, MetadataTags, Results, TagFiles
from library.preprocessing.tagging.rules import QUALITY, RATING, TagRules, read_tags
from library.preprocessing.tagging.tagger import Tagger
from library.preprocessing.tags import tags_in
from library.preprocessing.tally import Tally, batched, prepared, say

# options that make no difference to a picture's tags, or none that the tagger's folder does not make
_INDIFFERENT = {"train_data_dir", "output_path", "recursive", "caption_extension", "onnx", "provider", "batch_size"}
_INDIFFERENT |= {"repo_id", "model_dir", "force_download", "frequency_tags", "debug"}
_LARGEST = 8192  # pixels of a side that is padded: a long strip's square would not fit into memory


def tag_folder(options: TagImagesOptions, work: WorkOptions, *, named: bool) -> None:
    """Tags the pictures of a folder that have no tags yet, as the options say; `named`: whether the user names the
    tagger's repository. Says what has become of them. UserError if nothing has.
    """
    pictures = find_pictures("train_data_dir", options.train_data_dir, recursive=options.recursive)
    if options.output_path is None:
        pictures = with_files_of_their_own(pictures, with_dot(options.caption_extension))
    provider = ""
    with open_results(options, work, pictures) as results:
        todo = results.left(pictures)
        if todo or results.unfinished:
            folder = find_tagger(Path(options.model_dir), options.repo_id, named=named, download=options.force_download)
            rules = TagRules(read_tags(folder / TAGS), options)
            tagger = Tagger(folder / MODEL, len(rules.tags), options.provider)
            provider = tagger.provider
            todo = results.go_on(_purpose(options, work, folder), todo)
        tally = Tally(skipped=len(pictures) - len(todo))
        with tally:
            if todo:
                how = {"batch_size": options.batch_size, "threads": work.threads, "debug": options.debug}
                tag_pictures(todo, results, tagger, rules, tally, **how)
            if options.frequency_tags:
                show_frequencies(pictures, results)
            results.finish()
    tally.tell("tags", provider)


def open_results(options: TagImagesOptions, work: WorkOptions, pictures: Sequence[Path]) -> Results:
    """Where the options want the tags of these pictures. UserError if what is there cannot be read."""
    separator, how = options.caption_separator, {"append": options.append_tags, "force": work.force}
    path = options.output_path
    if path is None:
        return TagFiles(options.train_data_dir, options.caption_extension, separator, **how)
    kind = MetadataTags if path.suffix.lower() == METADATA else LineTags
    return kind(path, pictures, separator, **how)


def _purpose(options: TagImagesOptions, work: WorkOptions, tagger: Path) -> dict[str, Any]:
    """What makes a difference to a picture's tags."""
    flags = {f"--{name}": value for name, value in asdict(options).items() if name not in _INDIFFERENT}
    return {**flags, "--force": work.force, "the tagger": os.path.realpath(tagger)}


def tag_pictures(
    pictures: Sequence[Path],
    results: Results,
    tagger: Tagger,
    rules: TagRules,
    tally: Tally,
    *,
    batch_size: int,
    threads: int,
    debug: bool,
) -> None:
    """Tags pictures in batches, decoded by so many threads. Each is counted in the tally; `debug` shows what the model
    finds in it.
    """
    square = partial(white_square, side=tagger.side)
    squares = prepared(pictures, square, tally, threads=threads, doing="tagging", ahead=batch_size)
    for batch in batched(squares, batch_size):
        probabilities = tagger.probabilities(np.stack([pixels for _, pixels in batch]))
        for (picture, _), row in zip(batch, probabilities, strict=True):
            if debug:
                say(found(picture, row, rules))
            try:
                changed = results.add(picture, rules.names(row))
            except BrokenImage as problem:
                tally.fail(picture, problem)
                continue
            tally.written += changed
            tally.skipped += not changed


def white_square(path: Path, side: int) -> np.ndarray:
    """A picture as taggers take it: blue, green and red, float32 (side, side, 3) in 0..255.

    Transparent parts are white, and so is what makes it a square with the picture in its middle; areas are averaged
    when that shrinks, and a Lanczos kernel is used when it grows. Raises BrokenImage.
    """
    pixels, _ = decode(path, keep_alpha=False, legacy=False)
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if longest > _LARGEST:
        height, width = (max(1, round(length * _LARGEST / longest)) for length in (height, width))
        pixels, longest = resize(pixels, (width, height)), _LARGEST
    if height != width:
        square = np.full((longest, longest, 3), 255, np.uint8)
        top, left = (longest - height) // 2, (longest - width) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return resize(pixels, (side, side))[..., ::-1].astype(np.float32)


def found(picture: Path, probabilities: np.ndarray, rules: TagRules) -> str:
    """What a model finds in a picture, by category: rating, quality, and the tags that reach their threshold."""
    by_category: dict[str, list[str]] = {}
    best = (rules.best(category, probabilities) for category in (RATING, QUALITY))
    for number in [number for number in best if number is not None] + rules.chosen(probabilities).tolist():
        name, category = rules.tags[number]
        by_category.setdefault(category, []).append(f"{name} {probabilities[number]:.2f}")
    return "\n".join([str(picture), *(f"  {category}: {', '.join(names)}" for category, names in by_category.items())])


def show_frequencies(pictures: Sequence[Path], results: Results) -> None:
    """Print each tag with the number of these pictures that have it, the most frequent first."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        try:
            counts.update(set(tags_in(results.text(picture) or "", results.separator)))
        except BrokenImage:
            continue
    say("tags by the number of pictures that have them:")
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        say(f"{count:7d}  {name}")
