"""Captions by GIT."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option
from library.options.captioning import CaptioningOptions


@dataclass(frozen=True)
class MakeCaptionsByGitOptions(CaptioningOptions):
    """Which model writes the captions, and how long they may become."""

    title: ClassVar[str] = "making captions"

    model_id: str = option(
        "microsoft/git-large-textcaps", "GIT model: a repository of the Hugging Face hub or a folder", metavar="MODEL"
    )
    max_length: int = option(50, "tokens of a caption, at most", metavar="N", minimum=1)
    remove_words: bool = option(
        False, 'leave out what is said of writing in the picture, as `with the words "..." on it`'
    )
