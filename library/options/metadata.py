"""What saved files tell about themselves."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option


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
