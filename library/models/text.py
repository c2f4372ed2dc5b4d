"""Captions -> token ids -> hidden states, for CLIP text encoders."""

import gzip
import html
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.transfer import to_device

_VOCABULARY = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SIZE = 49408
BEGIN, END = 49406, 49407
CHUNK = 75  # tokens between begin and end in one pass through the encoder

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
    count = _VOCABULARY_SIZE - 2 * 256 - 2
    return tuple(tuple(line.split()) for line in lines[1 : 1 + count])


def clip_tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer built from the vocabulary in this package: nothing is downloaded or looked up."""
    symbols = _byte_symbols()
    merges = list(_merges())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == _VOCABULARY_SIZE
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=CHUNK + 2
    )


class Tokenizer:
    """Captions -> CLIP token ids. SD 1.x pads with end-of-text (the default), other encoders with id 0."""

    def __init__(self, pad: int = END):
        self.pad = pad
        self.backend = clip_tokenizer()

    def words(self, caption: str) -> list[int]:
        """The caption's own ids, however many, without begin, end and padding."""
        return self.backend(clean(caption), add_special_tokens=False)["input_ids"]

    def chunk(self, ids: Sequence[int]) -> list[int]:
        """One pass through the encoder: at most 75 ids between begin and end, padded to 77."""
        wrapped = [BEGIN, *ids[:CHUNK], END]
        return wrapped + [self.pad] * (CHUNK + 2 - len(wrapped))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids (B, 77), int64 on the CPU; what does not fit is cut off."""
        return torch.tensor([self.chunk(self.words(caption)) for caption in captions], dtype=torch.int64)


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


def token_report(caption: str, tokenizer: Tokenizer, length: int = CHUNK) -> TokenReport:
    """How many tokens a caption has, and what of it lies beyond the first `length` of them.

    The end is given as it stands in the caption; where that cannot be told, because an HTML entity is in the way, as
    the model would read it.
    """
    cleaned = clean(caption)
    places = tokenizer.backend(cleaned, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(places) <= length:
        return TokenReport(len(places), None)
    start = places[length][0]
    seen, rest = cleaned[:start].rstrip(), cleaned[start:].lstrip()
    # cleaning a beginning of the caption gives a beginning of the cleaned caption, the longer the longer
    cut = caption[bisect_left(range(len(caption)), len(seen), key=lambda end: len(clean(caption[:end]))) :]
    return TokenReport(len(places), cut if clean(cut) == rest else rest)


class TextEncoder(nn.Module):
    """A CLIP text encoder: ids (B, 77) -> hidden states (B, 77, width), last layer through the final norm."""

    def __init__(self, config: dict):
        super().__init__()
        self.model = CLIPTextModel(CLIPTextConfig(**config))

    def rebuild_buffers(self, device: torch.device | str) -> None:
        """Make the position ids anew: no checkpoint fills them, so they are still on meta after loading."""
        positions = self.model.config.max_position_embeddings
        self.model.embeddings.position_ids = torch.arange(positions, device=device).expand((1, -1))

    def enable_gradient_checkpointing(self) -> None:
        """Compute the layers' activations twice instead of keeping them; takes effect in training mode."""
        # transformers renamed it within version 5
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
        getattr(self.model, new if hasattr(self.model, new) else old)()

    def forward(self, ids: Tensor) -> Tensor:
        ids = to_device(ids, self.model.embeddings.token_embedding.weight.device)
        return self.model(input_ids=ids).last_hidden_state
