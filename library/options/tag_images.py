"""Tagging pictures."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError
from library.options.base import option

METADATA, LINES = ".json", ".jsonl"
_THRESHOLDS = ("thresh", *(f"{kind}_threshold" for kind in ("general", "character", "meta", "model")))
_THRESHOLDS += ("copyright_threshold", "artist_threshold")


@dataclass(frozen=True)
class TagImagesOptions:
    """Which model tags which pictures, which of its tags are kept, and where they go."""

    title: ClassVar[str] = "tagging pictures"

    train_data_dir: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "folder of the pictures", positional=True
    )
    repo_id: str = option(
        "SmilingWolf/wd-v1-4-convnext-tagger-v2",
        "repository of the tagger on the hub: model.onnx and selected_tags.csv",
        metavar="OWNER/NAME",
    )
    model_dir: str = option(
        "wd14_tagger_model",
        "folder where taggers from the hub are kept, or one that holds model.onnx and selected_tags.csv itself",
        metavar="FOLDER",
    )
    force_download: bool = option(False, "download the tagger again, in place of what is there")
    provider: str | None = option(
        None,
        "what runs the model: cuda, cpu or another of onnxruntime's; cuda where it works when left out",
        metavar="NAME",
    )
    onnx: bool = option(False, "use the ONNX model, as is always done")
    batch_size: int = option(1, "pictures that go through the model at once", metavar="N", minimum=1)
    recursive: bool = option(False, "also tag the pictures in all folders below")
    caption_extension: str = option(
        ".txt", "ending of the files with the tags", metavar="EXT", aliases=("caption_extention",)
    )
    output_path: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None,
        "gather all tags in one file instead: .json is metadata as fine_tune.py reads it, .jsonl a line per picture",
        metavar="FILE",
    )
    append_tags: bool = option(False, "add tags to those that a picture has already, if it does not have them yet")
    caption_separator: str = option(", ", "what is written between tags", metavar="TEXT")

    thresh: float = option(0.35, "tags of at least this probability are kept", metavar="P", minimum=0)
    general_threshold: float | None = option(None, "the same of general tags", metavar="P", minimum=0)
    character_threshold: float | None = option(None, "the same of characters", metavar="P", minimum=0)
    copyright_threshold: float | None = option(None, "the same of series", metavar="P", minimum=0)
    artist_threshold: float | None = option(None, "the same of artists", metavar="P", minimum=0)
    meta_threshold: float | None = option(None, "the same of tags about the file itself", metavar="P", minimum=0)
    model_threshold: float | None = option(None, "the same of models that made the picture", metavar="P", minimum=0)

    remove_underscore: bool = option(False, "write spaces for underscores in tags of more than three characters")
    undesired_tags: str = option("", "tags never to write, separated by commas", metavar="TAGS")
    tag_replacement: str | None = option(
        None, "tags to write for others, as `old,new;old,new`; \\, and \\; are a comma and a semicolon", metavar="PAIRS"
    )
    character_tag_expand: bool = option(False, "write `name_(series)` of a character as two tags, `name` and `series`")
    character_tags_first: bool = option(False, "write characters before other tags")
    always_first_tags: str | None = option(
        None, "tags to write before all others where they occur, in this order, separated by commas", metavar="TAGS"
    )
    use_rating_tags: bool = option(False, "write the most probable rating, before other tags")
    use_rating_tags_as_last_tag: bool = option(False, "write the most probable rating, after other tags")
    use_quality_tags: bool = option(False, "write the most probable quality, before other tags")
    use_quality_tags_as_last_tag: bool = option(False, "write the most probable quality, after other tags")

    frequency_tags: bool = option(False, "show how many pictures have each tag at the end")
    debug: bool = option(False, "show what the model finds in each picture")

    def __post_init__(self) -> None:
        if self.train_data_dir is None:
            raise UserError("train_data_dir: the folder of the pictures is not given")
        for name in _THRESHOLDS:
            value = getattr(self, name)
            if value is not None and value > 1:
                raise UserError(f"--{name}: {value:g} is above 1, give a probability such as 0.35")
        if not self.caption_separator:
            raise UserError("--caption_separator: there is nothing between tags, give a text such as ', '")
        if self.output_path is not None and self.output_path.suffix.lower() not in (METADATA, LINES):
            raise UserError(
                f"--output_path: {self.output_path} ends in neither {METADATA} nor {LINES}, give a name that does"
            )
        _ = self.replacements

    @property
    def replacements(self) -> Mapping[str, str]:
        """What is written for which tag. UserError if they are not written as pairs."""
        pairs = {}
        for pair in _split(self.tag_replacement or "", ";"):
            words = _split(pair, ",")
            if len(words) != 2:
                raise UserError(
                    f"--tag_replacement: {pair!r} is not written as old,new (a comma in a tag is written \\,)"
                )
            old, new = (word.replace("\\,", ",").replace("\\;", ";") for word in words)
            pairs[old] = new
        return pairs

    def names(self, text: str) -> list[str]:
        """The tags in a list of the user's: separated by commas, or as tags are in files."""
        separator = self.caption_separator.strip()
        if separator and "," not in separator:
            text = text.replace(separator, ",")
        return [name.replace("\\,", ",") for name in _split(text, ",")]


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators without a backslash before them; without blank edges, and none empty."""
    return [part.strip() for part in re.split(rf"(?<!\\){separator}", text) if part.strip()]
