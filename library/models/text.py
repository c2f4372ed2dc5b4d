"""Captions -> token ids -> hidden states, for CLIP text encoders."""

import gzip
import html
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.models.prompt_weights import BEGIN, CHUNK, END, chunks, split_weights, weight_chunks
from library.transfer import to_device

_VOCABULARY = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408

_FULL_AND_HALF_WIDTH = range(0xFF01, 0xFFF0)
_LIGATURES = (*range(0xFB00, 0xFB07), 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
_SINGLE_QUOTES = (0x2BC, *range(0x2018, 0x201C))
_DOUBLE_QUOTES = range(0x201C, 0x2020)
_CONTROLS = (*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
_TYPOGRAPHY = {
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (*_FULL_AND_HALF_WIDTH, *_LIGATURES)},
    **dict.fromkeys(_SINGLE_QUOTES, "'"),
    **dict.fromkeys(_DOUBLE_QUOTES, '"'),
    **dict.fromkeys(_CONTROLS, None),
}
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")


def clean(caption: str) -> str:
    """The caption as CLIP was trained to read it: plain quotes and widths, one space between words, lower case.

    CLIP's own preprocessing (github.com/openai/CLIP, `simple_tokenizer.py`) runs the text through the package ftfy.
    This follows ftfy's documented rules for typography, HTML entities and control characters; it does not guess at
    text that was decoded with the wrong encoding.
    """
    if "<" not in caption:
        caption = _ENTITY.sub(lambda match: html.unescape(match[0]), caption)
    caption = unicodedata.normalize("NFC", caption.translate(_TYPOGRAPHY))
    return " ".join(caption.split()).lower()


def _byte_symbols() -> list[str]:
    """One printable character for each byte, in the vocabulary's order: printable Latin-1 first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(0x100, 0x100 + others))]


@lru_cache(maxsize=1)
def _merges() -> tuple[tuple[str, str], ...]:
    lines = gzip.decompress(_VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    # the first line is a heading; the file goes on beyond what CLIP uses
    count = VOCABULARY_SIZE - 2 * 256 - 2
    return tuple(tuple(line.split()) for line in lines[1 : 1 + count])


def clip_tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer built from the vocabulary in this package: nothing is downloaded or looked up."""
    symbols = _byte_symbols()
    merges = list(_merges())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == VOCABULARY_SIZE
    assert tokens.index("<|startoftext|>") == BEGIN
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=CHUNK + 2
    )


@dataclass(frozen=True)
class TextOptions:
    """How captions are read, whatever the family."""

    token_length: int = CHUNK
    """Tokens of a caption that are read: 75, or a multiple of it in as many passes through the encoders."""
    clip_skip: int | None = None
    """The layer whose answer counts, from the last (1) on; None: the one the family was trained with."""
    weighted: bool = False
    """Whether weights in captions, as in `(word:1.3)`, are heeded in training."""
    padded: bool = True
    """Whether captions are filled up to the token length; else only to the longest of a batch. Needs one pass."""


def _whole_word(word: str) -> str:
    """The pattern of a word. No letter may touch an edge that is one; an edge like those of `<cat>` stands alone."""
    before = r"(?<!\w)" if re.match(r"\w", word[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", word[-1]) else ""
    return before + re.escape(word) + after


class Tokens(NamedTuple):
    """Captions as encoders take them, on the CPU; n chunks of 75 tokens each."""

    ids: Tensor
    """(B, n, 77) int64."""
    weights: Tensor | None
    """(B, n, 77) float32; None where all are 1."""


class Tokenizer:
    """Captions -> CLIP token ids. SD 1.x pads with end-of-text (the default), other encoders with id 0."""

    def __init__(self, pad: int = END):
        self.pad = pad
        self.backend = clip_tokenizer()
        self.added: dict[str, tuple[int, ...]] = {}
        """Words with ids of their own, as `clean` leaves them."""
        self._added = re.compile(r"(?!)")  # which is nowhere

    def add(self, words: Mapping[str, Sequence[int]]) -> None:
        """Have these words read as the ids given, in capitals or not, wherever they stand as whole words."""
        self.added |= {clean(word): tuple(ids) for word, ids in words.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self._added = re.compile("|".join(map(_whole_word, longest_first)))

    def holds_added(self, caption: str) -> bool:
        """Whether an added word is in the caption."""
        return self._added.search(clean(caption)) is not None

    def words(self, caption: str) -> list[int]:
        """The caption's own ids, however many, without begin, end and padding."""
        return [id for id, _ in self.located(clean(caption))]

    def located(self, cleaned: str) -> list[tuple[int, int]]:
        """The ids of a cleaned caption, and where in it each begins."""
        found, done = [], 0
        for match in self._added.finditer(cleaned):
            found += self._located(cleaned[done : match.start()], done)
            found += [(id, match.start()) for id in self.added[match[0]]]
            done = match.end()
        return found + self._located(cleaned[done:], done)

    def _located(self, text: str, start: int) -> list[tuple[int, int]]:
        read = self.backend(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(id, start + place) for id, (place, _) in zip(read["input_ids"], read["offset_mapping"], strict=True)]

    def weighted_words(self, caption: str) -> tuple[list[int], list[float]]:
        """The same and their weights; what gives the weights has no ids."""
        ids, weights = [], []
        for text, weight in split_weights(caption):
            own = self.words(text)
            ids += own
            weights += [weight] * len(own)
        return ids, weights

    def __call__(
        self, captions: Sequence[str], length: int = CHUNK, weighted: bool = False, padded: bool = True
    ) -> Tokens:
        """What does not fit into `length` tokens, a multiple of 75, is cut off. If they are not `padded`, rows of one
        pass are no longer than the longest caption with its begin and end.
        """
        if not weighted:
            ids, weights = [self.words(caption) for caption in captions], None
        else:
            ids, weights = zip(*map(self.weighted_words, captions), strict=True)
        end = CHUNK + 2 if padded or length > CHUNK else min(max(map(len, ids)), length) + 2
        if weights is not None:
            weights = torch.tensor([weight_chunks(one, length) for one in weights], dtype=torch.float32)[..., :end]
            weights = None if (weights == 1).all() else weights
        return Tokens(self._ids(ids, length)[..., :end], weights)

    def _ids(self, words: Sequence[Sequence[int]], length: int) -> Tensor:
        return torch.tensor([chunks(ids, length, self.pad) for ids in words], dtype=torch.int64)


class TextOutputs(NamedTuple):
    """What a family's text encoders put out, for files that keep it."""

    suffix: str
    """End of the files' names."""
    arrays: Mapping[str, str]
    """Key of `encode_text`'s answer -> name of the array in a file."""
    prefixes: tuple[str, ...]
    """Beginnings of the names of the encoders' tensors in an original file."""


class TokenReport(NamedTuple):
    """How much of a caption an encoder reads."""

    count: int
    """Tokens of the whole caption, without begin and end."""
    cut: str | None
    """The end of the caption that is not read; None if all of it is."""


def token_report(caption: str, tokenizer: Tokenizer, length: int = CHUNK, weighted: bool = False) -> TokenReport:
    """How many tokens a caption has, and what of it lies beyond the first `length` of them.

    The end is given as it stands in the caption; where that cannot be told, because an HTML entity is in the way, as
    the model would read it. If it is `weighted`, brackets and numbers that give weights are left out.
    """
    count, cut = 0, ""
    for text, _ in split_weights(caption) if weighted else [(caption, 1.0)]:
        own = _piece_report(text, tokenizer, max(length - count, 0))
        count += own.count
        cut += text if cut and own.cut is None else own.cut or ""
    return TokenReport(count, cut or None)


def _piece_report(text: str, tokenizer: Tokenizer, length: int) -> TokenReport:
    cleaned = clean(text)
    places = [place for _, place in tokenizer.located(cleaned)]
    if len(places) <= length:
        return TokenReport(len(places), None)
    start = places[length]
    seen, rest = cleaned[:start].rstrip(), cleaned[start:].lstrip()
    # cleaning a beginning of the caption gives a beginning of the cleaned caption, the longer the longer
    cut = text[bisect_left(range(len(text)), len(seen), key=lambda end: len(clean(text[:end]))) :]
    return TokenReport(len(places), cut if clean(cut) == rest else rest)


class Encoded(NamedTuple):
    """What a text encoder says of captions of n chunks."""

    hidden: Tensor
    """(B, 75 x n + 2, width): one vector per token."""
    pooled: Tensor | None
    """(B, projection width): one vector per caption, of encoders that project."""


class TextEncoder(nn.Module):
    """A CLIP text encoder: ids (B, n, 77) -> hidden states, through the final norm if `normalises`.

    One that `projects` also gives the projection of its last, normed hidden state at the first end of the first chunk.
    `config` are arguments of CLIPTextConfig.
    """

    def __init__(self, config: Mapping[str, Any], *, projects: bool = False, normalises: bool = True):
        super().__init__()
        kind = CLIPTextModelWithProjection if projects else CLIPTextModel
        self.model = kind(CLIPTextConfig(**config))
        self.projects = projects
        self.normalises = normalises

    @property
    def clip(self) -> CLIPTextModel:
        """The model but for its projection."""
        return self.model.text_model if self.projects else self.model

    def rebuild_buffers(self, device: torch.device | str) -> None:
        """Make the position ids anew: no checkpoint fills them, so they are still on meta after loading."""
        positions = self.clip.config.max_position_embeddings
        self.clip.embeddings.position_ids = torch.arange(positions, device=device).expand((1, -1))

    def enable_gradient_checkpointing(self) -> None:
        """Compute the layers' activations twice instead of keeping them; takes effect in training mode."""
        # transformers renamed it within version 5
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(self.model, new if hasattr(self.model, new) else old)()

    def forward(self, ids: Tensor, layer: int = 1) -> Encoded:
        """`layer` is the one whose answer is taken, from the last (1) on."""
        ids = to_device(ids, self.clip.embeddings.token_embedding.weight.device)
        batch, count, _ = ids.shape
        inner = layer > 1 or not self.normalises
        output = self.clip(input_ids=ids.flatten(0, 1), output_hidden_states=inner)
        hidden = output.hidden_states[-layer] if inner else output.last_hidden_state
        if inner and self.normalises:
            hidden = self.clip.final_layer_norm(hidden)
        pooled = self._pooled(output.last_hidden_state.unflatten(0, (batch, count)), ids) if self.projects else None
        return Encoded(joined(hidden.unflatten(0, (batch, count))), pooled)

    def _pooled(self, last: Tensor, ids: Tensor) -> Tensor:
        """(B, n, 77, width) and (B, n, 77) -> (B, projection width). The end is found by its id, since added words have
        larger ones.
        """
        end = (ids[:, 0] == END).int().argmax(dim=-1)
        return self.model.text_projection(last[torch.arange(len(last), device=last.device), 0, end])

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.clip.config.num_hidden_layers


def joined(passes: Tensor) -> Tensor:
    """What belongs to the tokens of n chunks (B, n, 77, ...) -> (B, 75 x n + 2, ...): the first begin, all that is
    between begin and end, the last end.
    """
    return torch.cat([passes[:, 0, :1], passes[:, :, 1:-1].flatten(1, 2), passes[:, -1, -1:]], dim=1)


def weigh(hidden: Tensor, weights: Tensor | None, restore_mean: bool = False) -> Tensor:
    """Hidden states (B, 75 x n + 2, width), each token's multiplied by its weight (B, n, 77); None is 1 for all.

    `restore_mean` scales each caption's so that their mean over tokens and channels is what it was.
    """
    if weights is None:
        return hidden
    plain = hidden.float()
    weighted = plain * joined(to_device(weights, hidden.device)).unsqueeze(-1)
    if restore_mean:
        old, new = plain.mean((-2, -1), keepdim=True), weighted.mean((-2, -1), keepdim=True)
        weighted = weighted * torch.where((old == new) | (new == 0), 1.0, old / new)
    return weighted.to(hidden.dtype)
