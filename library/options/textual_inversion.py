"""Textual Inversion: the words that are learned, and what they start from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.errors import UserError, some, suggest_path
from library.options.base import MethodOptions, Settings, option
from library.options.model import ModelOptions
from library.options.resume import ResumeOptions
from library.suffixes import WEIGHTS_SUFFIXES

_NOT_IN_A_WORD = re.compile(r"[\s()\[\]{}|\\]")
_NOT_IN_A_FILE_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # on any system


def file_stem(word: str) -> str:
    """The name, without its ending, of a word's own file."""
    return _NOT_IN_A_FILE_NAME.sub("_", word)


@dataclass(frozen=True)
class TextualInversionOptions(MethodOptions):
    """The words, their vectors, and the captions that they are learned from."""

    title: ClassVar[str] = "Textual Inversion"
    scripts: ClassVar[tuple[str, ...]] = (
        "train_textual_inversion.py",
        "sdxl_train_textual_inversion.py",
    )

    token_string: str | None = option(
        None,
        "the new word, as captions have it; no word that the model knows. Several words at once by commas",
        metavar="WORD",
    )
    init_word: str | None = option(
        None,
        "a word that the model knows to start from; drawn at random when left out. Of several new words, one for all, "
        "or one for each by commas",
        metavar="WORD",
    )
    num_vectors_per_token: int = option(
        1, "vectors of each word; more of them hold more, and take more of a prompt's tokens", metavar="N", minimum=1
    )
    weights: str | None = option(
        None,
        "go on with the vectors in this file; of several words, in a folder, or in files by commas",
        metavar="FILE",
    )
    use_object_template: bool = option(False, "instead of the captions, use sentences that show the word as a thing")
    use_style_template: bool = option(False, "instead of the captions, use sentences that show the word as a style")
    save_model_as: str = option(
        "pt", "format of the trained file", metavar="FORMAT", choices=("ckpt", "pt", "safetensors")
    )

    def __post_init__(self) -> None:
        for word in self.words:
            if found := _NOT_IN_A_WORD.search(word):
                raise UserError(
                    f"--token_string: {word!r} has {found[0]!r} in it, which no single word of a caption has: give one "
                    "word, such as mychar4 or <mychar>, or several by commas"
                )
        if self.use_object_template and self.use_style_template:
            raise UserError("--use_object_template, --use_style_template: they exclude each other, drop one of them")
        if self.several:
            self._check_several()

    def _check_several(self) -> None:
        """UserError for what makes no sense with more than one word."""
        if "" in self.words:
            raise UserError(f"--token_string: there is nothing beside one of the commas in {self.token_string}")
        for name in ("use_object_template", "use_style_template"):
            if getattr(self, name):
                raise UserError(
                    f"--{name}: its sentences cannot tell which image shows which of {some(self.words)}: drop it and "
                    "put the words into the captions"
                )
        named: dict[str, str] = {}
        for word in self.words:
            if (other := named.setdefault(file_stem(word).casefold(), word)) != word or self.words.count(word) > 1:
                raise UserError(
                    f"--token_string: {other} and {word} would be saved in one file, {file_stem(word)}: choose another "
                    "word for one of them"
                )
        if len(self.init_words) not in (0, 1, len(self.words)):
            raise UserError(
                f"--init_word: there are {len(self.init_words)} for {len(self.words)} words: give one for all, or one "
                "for each, by commas"
            )

    def check(self, settings: Settings) -> None:
        """UserError for no word, for one that does not fit into a caption's tokens, and for a missing file to start
        from, which a run that resumes does without.
        """
        room = settings[ModelOptions].max_token_length or 75
        if not self.token_string:
            raise UserError("no word to learn: give --token_string one that the model does not know, such as mychar4")
        if self.num_vectors_per_token > room:
            raise UserError(
                f"--num_vectors_per_token: {self.num_vectors_per_token} vectors do not fit into the {room} tokens of a "
                "caption: give fewer, or --max_token_length 150 or 225"
            )
        if self.weights and not settings[ResumeOptions].resume:
            self.weights_files()

    def weights_files(self) -> list[Path]:
        """The files of --weights, one for each word. UserError if they are not there."""
        folder = Path(self.weights)
        if folder.is_dir():
            return [_file_of(word, folder) for word in self.words]
        files = list(map(Path, _by_commas(self.weights))) if self.several else [folder]
        if len(files) != len(self.words):
            raise UserError(
                f"--weights: {self.weights} is no folder, and {len(files)} "
                f"{'file' if len(files) == 1 else 'files'} for {len(self.words)} words: give a folder with a file for "
                "each, or the files by commas, in the order of the words"
            )
        for file in files:
            if not file.is_file():
                raise UserError(f"--weights: {file} is no file{suggest_path(file, WEIGHTS_SUFFIXES)}")
        return files

    @property
    def trains_text_encoder(self) -> bool:
        """Whether what the text encoders put out changes in the course of the run."""
        return True

    @property
    def words(self) -> tuple[str, ...]:
        """The words of --token_string."""
        if not self.token_string:
            return ()
        return _by_commas(self.token_string) if self.several else (self.token_string,)

    @property
    def several(self) -> bool:
        """Whether there is more than one word, each of which gets a file of its own in a folder."""
        return "," in (self.token_string or "")

    @property
    def init_words(self) -> tuple[str, ...]:
        """What to start from: nothing, or one for all words, or one for each."""
        if self.init_word is None:
            return ()
        return _by_commas(self.init_word) if self.several else (self.init_word,)


def _by_commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _file_of(word: str, folder: Path) -> Path:
    """The one file of a word in a folder. UserError if it is not there, or there is more than one."""
    stem = file_stem(word).casefold()
    found = [file for file in sorted(folder.iterdir()) if file.stem.casefold() == stem]
    found = [file for file in found if file.suffix.lower() in WEIGHTS_SUFFIXES and file.is_file()]
    if len(found) != 1:
        what = f"holds {some([file.name for file in found])} for" if found else f"has no file {file_stem(word)} for"
        raise UserError(f"--weights: {folder} {what} the word {word}: give the files themselves, by commas")
    return found[0]
