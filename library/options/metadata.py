"""What saved files tell about themselves."""

import base64
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from library.errors import UserError, suggest_path
from library.options.base import option

_FORMATS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}
_LARGEST = 1 << 20  # bytes: every program that looks at a file's header reads it
_YES_AND_NO = {"true": "true", "yes": "true", "1": "true", "false": "false", "no": "false", "0": "false"}


@dataclass(frozen=True)
class MetadataOptions:
    """Descriptive fields of saved files."""

    title: ClassVar[str] = "metadata"

    no_metadata: bool = option(False, "save no training metadata, only what is needed to load the file")
    training_comment: str | None = option(None, "any text to keep with the training metadata", metavar="TEXT")
    metadata_title: str | None = option(None, "title of the result; --output_name when left out", metavar="TEXT")
    metadata_author: str | None = option(None, "who made it", metavar="TEXT")
    metadata_description: str | None = option(None, "what it is", metavar="TEXT")
    metadata_license: str | None = option(None, "under which licence it may be used", metavar="TEXT")
    metadata_tags: str | None = option(None, "words to find it by, separated by commas", metavar="TEXT")
    metadata_usage_hint: str | None = option(None, "how it is best used", metavar="TEXT")
    metadata_thumbnail: str | None = option(
        None, "a small picture of what it does: a file, best a JPEG of 256x256, or a data URL", metavar="FILE"
    )
    metadata_merged_from: str | None = option(None, "what it was merged from, separated by commas", metavar="TEXT")
    metadata_trigger_phrase: str | None = option(None, "words in a prompt that call it", metavar="TEXT")
    metadata_preprocessor: str | None = option(None, "what its control images are made with", metavar="TEXT")
    metadata_is_negative_embedding: str | None = option(
        None, "true for an embedding that is meant for negative prompts", metavar="true|false"
    )

    def __post_init__(self) -> None:
        if (self.metadata_is_negative_embedding or "no").lower() not in _YES_AND_NO:
            raise UserError(
                f"--metadata_is_negative_embedding: {self.metadata_is_negative_embedding!r} is neither true nor false"
            )

    def described(self) -> dict[str, str]:
        """The flags whose values in files are others than on the command line, with these. UserError for a picture that
        cannot be used, which is read once.
        """
        found = {}
        if self.metadata_thumbnail:
            found["metadata_thumbnail"] = _data_url(self.metadata_thumbnail)
        if self.metadata_is_negative_embedding:
            found["metadata_is_negative_embedding"] = _YES_AND_NO[self.metadata_is_negative_embedding.lower()]
        return found


@lru_cache(maxsize=1)
def _data_url(picture: str) -> str:
    """A picture's file as a data URL (RFC 2397); one that is a data URL already stays as it is."""
    if picture.startswith("data:"):
        return picture
    path = Path(picture)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _LARGEST else b""
    except OSError as error:
        there = suggest_path(path) if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UserError(f"--metadata_thumbnail: there is no picture {path}{there}") from error
    if size > _LARGEST:
        raise UserError(
            f"--metadata_thumbnail: {path} has {size / 2**20:.1f} MB, which every file would carry in its header: make "
            f"it smaller than {_LARGEST >> 20} MB, 256x256 pixels will do"
        )
    kind = next((kind for start, kind in _FORMATS.items() if content.startswith(start)), None)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise UserError(f"--metadata_thumbnail: {path} is no JPEG, PNG, GIF or WebP picture")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
