"""Textual Inversion: the vectors of new words are trained, and nothing of the model."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from library.console import notice, warn
from library.data import templates
from library.data.captions import possible, varies
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.errors import UserError, some
from library.models.added_words import AddedRows, first_rows, read_embedding
from library.models.family import Family
from library.models.files.checkpoint import write_tensors
from library.models.metadata import RunFacts, embedding_metadata
from library.models.registry import ModelInfo
from library.models.text import VOCABULARY_SIZE, TextOptions, Tokenizer, clean
from library.models.word_folder import WordFile, check_words_replaceable, write_words
from library.options.optimizer import OptimizerOptions
from library.options.textual_inversion import TextualInversionOptions, file_stem
from library.training.methods.base import Method, ParameterGroup


class TextualInversion(Method):
    """Trains n rows for each word and each text encoder, behind the table of its vocabulary."""

    log_name = "textual_inversion"

    def __init__(
        self, options: TextualInversionOptions, optimizer: OptimizerOptions, reading: TextOptions | None = None
    ):
        """`reading`: how much of captions is read, and how; by default 75 tokens."""
        self.options = options
        self.reading = reading or TextOptions()
        self.rate = optimizer.learning_rate
        if not self.rate:
            raise UserError("nothing is left to train: --learning_rate is 0")
        self.rows: dict[str, torch.Tensor] = {}  # those of --weights
        self.trained: nn.ModuleDict

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: Mapping[str, Any] | None) -> None:
        """UserError, too, for words that cannot be learned or started from, and for --weights of other models."""
        target = self.target(stem)
        if self.options.several:
            check_words_replaceable(target)
        elif target.is_dir():
            raise UserError(f"{target} is a folder: choose another --output_name")
        tokenizer = next(iter(info.family.tokenizers().values()))
        self._check_words(tokenizer)
        self._init_ids(tokenizer, say=True)
        if self.options.weights and resumed is None:
            self.read_weights(info.outline())

    def _check_words(self, tokenizer: Tokenizer) -> None:
        """UserError for words that the model knows, or takes for one. Says what else they are known as."""
        words, known = self.options.words, tokenizer.backend.get_vocab()
        for name in self._words():
            if not clean(name):
                raise UserError(f"--token_string: there is no word in {name!r}, give one such as mychar4")
            if clean(name) in known:
                example = self.options.token_string if len(words) == 1 else name
                raise UserError(
                    f"--token_string: {name} is in the model's vocabulary already, choose a word that nobody uses, "
                    f"such as {example}-x1"
                )
        if len({clean(word) for word in words}) < len(words):
            raise UserError(f"--token_string: some of {some(words)} are one word to the model: choose others")
        for word in words:
            if len(tokenizer.words(word)) == 1:
                notice(f"the model knows {word} as a word of its own, which the new one hides")
            if self.options.several and file_stem(word) != word:
                notice(f"{word} is saved as {self._file_name(word)}, by whose name other programs may know it")
        for one, other in itertools.permutations(words, 2):
            if clean(one) in clean(other) and self.options.num_vectors_per_token > 1:
                notice(f"{one} is a part of {other}: Diffusers confuses them where a prompt has both")

    def _init_ids(self, tokenizer: Tokenizer, *, say: bool = False) -> list[list[int]]:
        """The tokens that each word starts from, if any. UserError for an init word without tokens."""
        options, count = self.options, self.options.num_vectors_per_token
        if not options.init_words or options.weights:
            if options.init_words and say:
                notice("--init_word has no effect: the vectors start from those of --weights")
            return [[] for _ in options.words]
        found = []
        for word in options.init_words:
            ids = tokenizer.words(word)
            if not ids:
                raise UserError(f"--init_word: there is no word in {word!r}, give one or leave it out")
            if say and len(ids) != count:
                done = "the last are left out" if len(ids) > count else "repeated to fill them"
                tokens = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
                notice(f"--init_word {word} has {tokens} for --num_vectors_per_token {count}: {done}")
            found.append(ids)
        return found if len(found) > 1 else found * len(options.words)

    def check_captions(self, table: RecordTable, datasets: Sequence[DatasetConfig]) -> None:
        tokenizer = Tokenizer()
        self.add_words(tokenizer)
        is_trained = table.training(datasets)
        self._note_useless(tokenizer, table, datasets, np.flatnonzero((table.repeats > 0) & ~is_trained))
        if found := self.templates():
            word = self.options.token_string
            notice(f"captions are not used: each use of an image gets one of {len(found)} sentences with {word} in it")
            return
        used = np.flatnonzero(is_trained)
        seen = [self._held(tokenizer, table, datasets, index) for index in used]
        read = Counter(word for held in seen for word in held.read)
        self._require_read(read, Counter(word for held in seen for word in held.written))
        if self.options.several:
            notice(", ".join(f"{word} is in {read[word]}" for word in self.options.words) + f" of {len(used)} captions")
        without = [index for index, held in zip(used, seen, strict=True) if not held.written]
        behind = [index for index, held in zip(used, seen, strict=True) if held.written and not held.read]
        if without:
            warn(
                f"{len(without)} of {len(used)} captions are without {self._any_word}, so their images teach nothing: "
                f"those of {_names(table, without)}"
            )
        if behind:
            warn(
                f"{len(behind)} of {len(used)} captions have {self._any_word} behind the {self.reading.token_length} "
                f"tokens that are read, so their images teach nothing: those of {_names(table, behind)}"
            )

    def _note_useless(
        self, tokenizer: Tokenizer, table: RecordTable, datasets: Sequence[DatasetConfig], regular: np.ndarray
    ) -> None:
        """Of regularisation images, which keep their captions."""
        count = sum(not self._held(tokenizer, table, datasets, index).read for index in regular)
        if count:
            images = "1 regularisation image is" if count == 1 else f"{count} regularisation images are"
            notice(
                f"{images} without {self._any_word} in the caption and teach nothing, since nothing else is trained: "
                "leaving them out saves time"
            )

    def _require_read(self, read: Mapping[str, int], written: Mapping[str, int]) -> None:
        """UserError for words that nothing would be learned of."""
        lost = [word for word in self.options.words if not read[word]]
        if not lost:
            return
        are, it = ("is", "it") if len(lost) == 1 else ("are", "them")
        where, advice = "as a word of its own", f"put {it} into the captions or class tokens"
        if len(lost) > 1:
            where = "as words of their own"
        if any(written[word] for word in lost):
            length = self.reading.token_length
            where, advice = f"within the {length} tokens that are read", f"put {it} further to the front"
            advice += ", or use --max_token_length 225" if length < 225 else ""
        elif not self.options.several:
            advice += ", or use --use_object_template or --use_style_template"
        raise UserError(
            f"--token_string: {some(lost)} {are} in no caption {where}, so nothing would be learned of {it}: {advice}"
        )

    def _held(self, tokenizer: Tokenizer, table: RecordTable, datasets: Sequence[DatasetConfig], index: int) -> "_Held":
        """Which words are in an image's caption, and which of them are read."""
        dataset, subset = table.subsets[index].tolist()
        options = datasets[dataset].subsets[subset].captions
        text = possible(table.caption(index), options)
        if not tokenizer.holds_added(text):
            return _Held(frozenset(), frozenset())
        ids = tokenizer.weighted_words(text)[0] if self.reading.weighted else tokenizer.words(text)
        written = self._of_ids(ids)
        # where a word lands that is shuffled or drawn, nobody knows
        return _Held(written, written if varies(options) else self._of_ids(ids[: self.reading.token_length]))

    def _of_ids(self, ids: Sequence[int]) -> frozenset[str]:
        """The words that any of these tokens belong to."""
        count = self.options.num_vectors_per_token
        return frozenset(self.options.words[(id - VOCABULARY_SIZE) // count] for id in ids if id >= VOCABULARY_SIZE)

    @property
    def _any_word(self) -> str:
        words = self.options.words
        return f"any of {some(words)}" if len(words) > 1 else words[0]

    def templates(self) -> tuple[str, ...]:
        chosen = templates.THING if self.options.use_object_template else ()
        chosen = templates.STYLE if self.options.use_style_template else chosen
        return tuple(sentence.format(self.options.token_string) for sentence in chosen)

    def add_words(self, tokenizer: Tokenizer) -> None:
        tokenizer.add(self._words())

    def _words(self) -> dict[str, Sequence[int]]:
        """Each word stands for all of its tokens, and its numbered names for one each: word1 for the second, word2 ...
        There is no such name where it is a word itself, or would be that of two.
        """
        words, count = self.options.words, self.options.num_vectors_per_token
        ids = {word: range(first, first + count) for word, first in zip(words, itertools.count(VOCABULARY_SIZE, count))}
        numbered = [(f"{word}{number}", [own[number]]) for word, own in ids.items() for number in range(1, count)]
        times = Counter(clean(name) for name in (*words, *(name for name, _ in numbered)))
        return ids | {name: own for name, own in numbered if times[clean(name)] == 1}

    def build(self, model: Family) -> nn.Module:
        model.requires_grad_(False)
        ids, count = self._init_ids(model.own_tokenizers[0]), self.options.num_vectors_per_token
        self.trained = nn.ModuleDict()
        for name, table in _tables(model).items():
            if self.rows:
                rows = self.rows[name].to(table.weight.device)
            else:
                rows = torch.cat([first_rows(table, own, count) for own in ids])
            self.trained[name] = AddedRows(rows)
        model.add_words(self._words(), list(self.trained.values()))
        return self.trained

    def read_weights(self, model: Family) -> None:
        """Have `build` start from the files of --weights. UserError if they do not fit the model or the flags."""
        widths = {name: table.embedding_dim for name, table in _tables(model).items()}
        files, count = self.options.weights_files(), self.options.num_vectors_per_token
        found = [read_embedding(file, widths) for file in files]
        for file, rows in zip(files, found, strict=True):
            own = len(next(iter(rows.values())))
            if own != count:
                raise UserError(f"--weights: {file} has {own} vectors, not {count}: give --num_vectors_per_token {own}")
        self.rows = {name: torch.cat([rows[name] for rows in found]) for name in widths}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("embedding", list(self.trained.parameters()), self.rate)]

    def target(self, stem: Path) -> Path:
        return stem if self.options.several else stem.with_name(self._file_name(stem.name))

    def _file_name(self, word: str) -> str:
        return f"{file_stem(word) if self.options.several else word}.{self.options.save_model_as}"

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        path = self.target(stem)
        tensors = {name: own.rows.detach() for name, own in self.trained.items()}
        if self.options.several:
            write_words(path, dict(self._files(tensors, metadata)), dtype)
        else:
            write_tensors(path, tensors, dtype, metadata, content_hash=True)
        return path

    def _files(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> Iterator[tuple[str, WordFile]]:
        """What the file of each word holds. It tells of this word alone."""
        words, count = self.options.words, self.options.num_vectors_per_token
        init = self.options.init_words if len(self.options.init_words) > 1 else (self.options.init_word,) * len(words)
        for number, (word, begun) in enumerate(zip(words, init, strict=True)):
            own = {name: rows[number * count : (number + 1) * count] for name, rows in tensors.items()}
            told = {"ss_token_string": word, "ss_init_word": str(begun)}
            told = {name: value for name, value in told.items() if name in metadata}
            yield word, WordFile(self._file_name(word), own, {**metadata, **told})

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        return embedding_metadata(settings, facts)


class _Held(NamedTuple):
    """New words in a caption."""

    written: frozenset[str]
    read: frozenset[str]
    """Those within the tokens that are read."""


def _names(table: RecordTable, indices: Sequence[int]) -> str:
    return some([os.path.basename(table[index].path) for index in indices])


def _tables(model: Family) -> dict[str, nn.Embedding]:
    """The vectors of the vocabulary, by the names of the new ones in files."""
    tables = [encoder.clip.embeddings.token_embedding for encoder in model.text_encoders]
    return dict(zip(model.embedding_names, tables, strict=True))
