"""Textual Inversion: the vectors of one new word are trained, and nothing of the model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from library.console import notice, warn
from library.data import templates
from library.data.captions import possible
from library.data.config import DatasetConfig
from library.data.records import RecordTable
from library.errors import UserError, some
from library.models.added_words import AddedRows, first_rows, read_embedding
from library.models.family import Family
from library.models.files.checkpoint import write_tensors
from library.models.metadata import RunFacts, embedding_metadata
from library.models.registry import ModelInfo
from library.models.text import VOCABULARY_SIZE, Tokenizer, clean
from library.options.optimizer import OptimizerOptions
from library.options.textual_inversion import TextualInversionOptions
from library.training.methods.base import Method, ParameterGroup


class TextualInversion(Method):
    """Trains one row of n vectors for each text encoder, behind the table of its vocabulary."""

    log_name = "textual_inversion"

    def __init__(self, options: TextualInversionOptions, optimizer: OptimizerOptions):
        self.options = options
        self.rate = optimizer.learning_rate
        if not self.rate:
            raise UserError("nothing is left to train: --learning_rate is 0")
        self.rows: dict[str, torch.Tensor] = {}  # those of --weights
        self.trained: nn.ModuleDict

    def settle_output(self, info: ModelInfo, stem: Path, *, resumed: bool) -> None:
        """UserError, too, for words that cannot be learned or started from, and for --weights of other models."""
        target = self.target(stem)
        if target.is_dir():
            raise UserError(f"{target} is a folder: choose another --output_name")
        tokenizer = next(iter(info.family.tokenizers().values()))
        known = tokenizer.backend.get_vocab()
        for name in self.options.names:
            if not clean(name):
                raise UserError(f"--token_string: there is no word in {name!r}, give one such as mychar4")
            if clean(name) in known:
                raise UserError(
                    f"--token_string: {name} is in the model's vocabulary already, choose a word that nobody uses, "
                    f"such as {self.options.token_string}-x1"
                )
        if len(tokenizer.words(self.options.names[0])) == 1:
            notice(f"the model knows {self.options.token_string} as a word of its own, which the new one hides")
        self._init_ids(tokenizer, say=True)
        if self.options.weights and not resumed:
            self.read_weights(info.outline())

    def _init_ids(self, tokenizer: Tokenizer, *, say: bool = False) -> list[int]:
        """The tokens to start from, if any. UserError for a word without tokens."""
        word, count = self.options.init_word, self.options.num_vectors_per_token
        if word is None or self.options.weights:
            if word is not None and say:
                notice("--init_word has no effect: the vectors start from those of --weights")
            return []
        ids = tokenizer.words(word)
        if not ids:
            raise UserError(f"--init_word: there is no word in {word!r}, give one or leave it out")
        if say and len(ids) != count:
            done = "the last are left out" if len(ids) > count else "repeated to fill them"
            tokens = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
            notice(f"--init_word {word} has {tokens} for --num_vectors_per_token {count}: {done}")
        return ids

    def check_captions(self, table: RecordTable, datasets: Sequence[DatasetConfig]) -> None:
        word = self.options.token_string
        if found := self.templates():
            notice(f"captions are not used: each use of an image gets one of {len(found)} sentences with {word} in it")
            return
        tokenizer = Tokenizer()
        self.add_words(tokenizer)
        used = np.flatnonzero(table.training(datasets))
        without = []
        for index in used:
            dataset, subset = table.subsets[index].tolist()
            if not tokenizer.holds_added(possible(table.caption(index), datasets[dataset].subsets[subset].captions)):
                without.append(index)
        if len(without) == len(used):
            raise UserError(
                f"--token_string: {word} is in no caption as a word of its own, so nothing would be learned: put it "
                "into the captions or class tokens, or use --use_object_template or --use_style_template"
            )
        if without:
            names = some([os.path.basename(table[index].path) for index in without])
            warn(
                f"{len(without)} of {len(used)} captions are without {word}, so their images teach nothing: those of "
                f"{names}"
            )

    def templates(self) -> tuple[str, ...]:
        chosen = templates.THING if self.options.use_object_template else ()
        chosen = templates.STYLE if self.options.use_style_template else chosen
        return tuple(sentence.format(self.options.token_string) for sentence in chosen)

    def add_words(self, tokenizer: Tokenizer) -> None:
        tokenizer.add(self._words())

    def _words(self) -> dict[str, Sequence[int]]:
        """The word stands for all of its tokens, and its numbered names for one each."""
        ids = range(VOCABULARY_SIZE, VOCABULARY_SIZE + self.options.num_vectors_per_token)
        word, *numbered = self.options.names
        return {word: ids, **{name: [id] for name, id in zip(numbered, ids[1:], strict=True)}}

    def build(self, model: Family) -> nn.Module:
        model.requires_grad_(False)
        ids, count = self._init_ids(model.own_tokenizers[0]), self.options.num_vectors_per_token
        self.trained = nn.ModuleDict()
        for name, table in _tables(model).items():
            rows = self.rows[name].to(table.weight.device) if self.rows else first_rows(table, ids, count)
            self.trained[name] = AddedRows(rows)
        model.add_words(self._words(), list(self.trained.values()))
        return self.trained

    def read_weights(self, model: Family) -> None:
        """Have `build` start from the file of --weights. UserError if it does not fit the model or the flags."""
        widths = {name: table.embedding_dim for name, table in _tables(model).items()}
        self.rows, count = read_embedding(self.options.weights, widths), self.options.num_vectors_per_token
        found = len(next(iter(self.rows.values())))
        if found != count:
            raise UserError(
                f"--weights: {self.options.weights} has {found} vectors, not {count}: give --num_vectors_per_token "
                f"{found}"
            )

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("embedding", list(self.trained.parameters()), self.rate)]

    def target(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.{self.options.save_model_as}")

    def save(self, stem: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
        path = self.target(stem)
        tensors = {name: own.rows.detach() for name, own in self.trained.items()}
        write_tensors(path, tensors, dtype, metadata, content_hash=True)
        return path

    def metadata(self, settings: Mapping[str, Any], facts: RunFacts) -> dict[str, str]:
        return embedding_metadata(settings, facts)


def _tables(model: Family) -> dict[str, nn.Embedding]:
    """The vectors of the vocabulary, by the names of the new ones in files."""
    tables = [encoder.clip.embeddings.token_embedding for encoder in model.text_encoders]
    return dict(zip(model.embedding_names, tables, strict=True))
