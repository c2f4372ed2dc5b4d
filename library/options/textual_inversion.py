"""Textual Inversion: the word that is learned, and what it starts from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError, suggest_path
from library.options.base import option
from library.suffixes import WEIGHTS_SUFFIXES

_NOT_IN_A_WORD = re.compile(r"[\s,()\[\]{}|\\]")


@dataclass(frozen=True)
class TextualInversionOptions:
    """The word, its vectors, and the captions that it is learned from."""

    title: ClassVar[str] = "Textual Inversion"

    token_string: str | None = option(
        None, "the new word, as captions have it; no word that the model knows", metavar="WORD"
    )
    init_word: str | None = option(
        None, "a word that the model knows to start from; drawn at random when left out", metavar="WORD"
    )
    num_vectors_per_token: int = option(
        1, "vectors of the word; more of them hold more, and take more of a prompt's tokens", metavar="N", minimum=1
    )
    weights: str | None = option(None, "go on with the vectors in this file", metavar="FILE")
    use_object_template: bool = option(False, "instead of the captions, use sentences that show the word as a thing")
    use_style_template: bool = option(False, "instead of the captions, use sentences that show the word as a style")
    save_model_as: str = option(
        "pt", "format of the trained file", metavar="FORMAT", choices=("ckpt", "pt", "safetensors")
    )

    def __post_init__(self) -> None:
        if self.token_string and (found := _NOT_IN_A_WORD.search(self.token_string)):
            raise UserError(
                f"--token_string: {self.token_string!r} has {found[0]!r} in it, which no single word of a caption has: "
                "give one word, such as mychar4 or <mychar>"
            )
        if self.use_object_template and self.use_style_template:
            raise UserError("--use_object_template, --use_style_template: they exclude each other, drop one of them")

    def check(self, room: int, *, resumes: bool) -> None:
        """UserError for no word, for one that does not fit into the `room` of a caption's tokens, and for a missing
        file to start from, which a run that `resumes` does without.
        """
        if not self.token_string:
            raise UserError("no word to learn: give --token_string one that the model does not know, such as mychar4")
        if self.num_vectors_per_token > room:
            raise UserError(
                f"--num_vectors_per_token: {self.num_vectors_per_token} vectors do not fit into the {room} tokens of a "
                "caption: give fewer, or --max_token_length 150 or 225"
            )
        if self.weights and not resumes and not Path(self.weights).is_file():
            path = Path(self.weights)
            raise UserError(f"--weights: {path} is no file{suggest_path(path, WEIGHTS_SUFFIXES)}")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether what the text encoders put out changes in the course of the run."""
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """The word, and the names by which each vector but the first can be called alone: word, word1, word2 ..."""
        numbers = range(1, self.num_vectors_per_token)
        return (self.token_string or "", *(f"{self.token_string}{number}" for number in numbers))
