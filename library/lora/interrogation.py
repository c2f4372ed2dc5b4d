"""Which words a network reacts to."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from library.bars import progress_bar
from library.errors import UserError, some
from library.lora.changes import change_layer, misfit_of
from library.lora.metadata import base_of
from library.lora.names import TEXT, named_modules
from library.lora.reading import NetworkFile, open_network
from library.models.family import Family
from library.models.prompt_weights import BEGIN, END
from library.models.registry import inspect_model
from library.models.text import Tokenizer

_WORD_END = "</w>"


_SAMPLE = 1000  # words that tell what a network does to any word


class Reaction(NamedTuple):
    """A token of the vocabulary, and how much more or less than to words as such the network does to its meaning: the
    mean absolute value of what it adds to what the text encoders say, less what it adds on average.
    """

    word: str
    difference: float


class Moves(NamedTuple):
    """What a network adds to an encoder's answers at a token and at the end behind it, (B, 2, width)."""

    by_encoder: tuple[Tensor, ...]

    def mean(self) -> "Moves":
        """The average over all tokens, (1, 2, width)."""
        return Moves(tuple(added.mean(dim=0, keepdim=True) for added in self.by_encoder))

    def distance(self, other: "Moves") -> Tensor:
        """The mean absolute difference (B,); all encoders count alike."""
        pairs = zip(self.by_encoder, other.by_encoder, strict=True)
        return torch.stack([(one - two).abs().mean(dim=(1, 2)) for one, two in pairs]).mean(dim=0)


def interrogate(
    model: str, network: Path, batch_size: int, clip_skip: int | None, device: torch.device, v2: bool = False
) -> list[Reaction]:
    """All tokens of the vocabulary, those first that the network does most to. A trained network moves all meanings a
    little, which says nothing of the words that it was trained with: what it does to words as such is not counted.

    UserError if one of the files cannot be used, they are of different kinds, or the network changes no text encoder.
    """
    info = inspect_model(model)
    if v2 and info.family.name != "sd2":
        raise UserError(f"--v2: {model} is no Stable Diffusion 2.x model, it is {info.family.as_kind()}: drop --v2")
    with open_network(network) as file:
        names = [name for name in file.layers if name.startswith(TEXT)]
        if not names:
            raise UserError(f"--model: {network} changes no text encoder, so no word means anything else with it")
        plain = info.load_text_encoders(device=device)
        changed = copy.deepcopy(plain)
        apply_to_text(file, names, changed)
    layer = clip_skip or plain.text_layer
    fewest = min(encoder.layers for encoder in plain.text_encoders)
    if layer > fewest:
        raise UserError(f"--clip_skip {layer} is too large: this model has a text encoder of {fewest} layers")
    ids = [id for id in range(END + 1) if id not in (BEGIN, END)]
    usual = moves(plain, changed, ids[:: max(len(ids) // _SAMPLE, 1)], layer).mean()
    differences = []
    with progress_bar(total=len(ids), desc="asking", unit="word", delay=1, leave=False) as bar:
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            differences += moves(plain, changed, batch, layer).distance(usual).tolist()
            bar.update(len(batch))
    words = spelled(plain.own_tokenizers[0], ids)
    found = [Reaction(word, difference) for word, difference in zip(words, differences, strict=True)]
    return sorted(found, key=lambda reaction: -reaction.difference)


@torch.no_grad()
def apply_to_text(file: NetworkFile, names: Sequence[str], model: Family) -> None:
    """Add what a network changes of a model's text encoders to their weights. UserError if it does not fit."""
    base = base_of(file)
    if base not in (None, type(model)):
        raise UserError(f"--model: {file.path} is for {base.title} and the model is {model.as_kind()}: give one for it")
    modules = named_modules(model.attach_points())
    missing = [name for name in names if name not in modules]
    if missing:
        raise UserError(
            f"--model: {file.path} is for another kind of model than this {model.title} model, which has no "
            f"{some(missing)}"
        )
    for name in names:
        module, change = modules[name], file.change(name)
        if reason := misfit_of(change, module):
            raise UserError(f"--model: {file.path} does not fit the model: {name} ({reason})")
        change_layer(module, [(change, 1.0)])


@torch.no_grad()
def moves(plain: Family, changed: Family, ids: Sequence[int], layer: int) -> Moves:
    """What one model says more than the other. What they say at the beginning does not depend on the token."""
    captions = torch.tensor([[[BEGIN, id, END]] for id in ids])
    encoders = zip(plain.text_encoders, changed.text_encoders, strict=True)
    return Moves(tuple((other(captions, layer).hidden - one(captions, layer).hidden)[:, 1:] for one, other in encoders))


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as they stand in captions; those that are only the beginning or the middle of a word end in a hyphen."""
    tokens = tokenizer.backend.convert_ids_to_tokens(list(ids))
    texts = [tokenizer.backend.decode([id]).strip() for id in ids]
    return [text if token.endswith(_WORD_END) else f"{text}-" for token, text in zip(tokens, texts, strict=True)]
