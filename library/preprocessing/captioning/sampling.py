"""How a caption's words are chosen from what a model predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from library.randomness import generator

# What no flag says, where a model does not say it either: as the authors of BLIP draw captions.
_TOP_K = 50
_REPETITION_PENALTY = 1.1


@dataclass(frozen=True)
class Choice:
    """Whether words are drawn, or the likeliest are searched for; and how many there may be."""

    max_length: int
    min_length: int = 0
    beams: int | None = 1
    """Texts in view when the likeliest is searched for; None draws each word instead."""
    top_p: float = 1.0
    seed: int = 0


def generation_settings(choice: Choice, model: Any, prompt_length: int) -> GenerationConfig:
    """For `model.generate`: what flags say is set whatever the model's own settings are, which hold for all else.

    `prompt_length` tokens of the prompt count as part of the caption.
    """
    settings = {}
    if choice.beams is None and model.generation_config.repetition_penalty is None:
        settings["repetition_penalty"] = _REPETITION_PENALTY
    return GenerationConfig(
        do_sample=False,  # what is drawn is the only word that `AddressedDraw` leaves
        num_beams=choice.beams or 1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        max_new_tokens=max(choice.max_length - prompt_length, 1),
        min_length=0,
        min_new_tokens=max(choice.min_length - prompt_length, 1),
        **settings,
    )


def logits_processors(choice: Choice, model: Any, names: Sequence[str]) -> LogitsProcessorList:
    """What `model.generate` does to its predictions for pictures of these names, one row each."""
    if choice.beams is not None:
        return LogitsProcessorList()
    own = model.generation_config
    draw = AddressedDraw(choice.seed, names, own.temperature or 1.0, own.top_k or _TOP_K, choice.top_p)
    return LogitsProcessorList([draw])


class AddressedDraw(LogitsProcessor):
    """Leaves the one token that is drawn: from the chances of the `top_k` likeliest ones, of which those suffice that
    together have `top_p` (nucleus sampling, https://arxiv.org/abs/1904.09751), by inverting their cumulative sum at a
    number that only the seed, the picture's name and the token's position decide. So neither the batch nor what was
    captioned before matters.
    """

    def __init__(self, seed: int, names: Sequence[str], temperature: float, top_k: int, top_p: float):
        self.seed = seed
        self.names = names
        self.temperature = temperature
        self.top_k = top_k
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.position = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of which all are -inf but one in each row."""
        draws = [generator(self.seed, name, self.position).random() for name in self.names]
        self.position += 1
        kept, tokens = _likeliest(scores.float() / self.temperature, self.top_k)
        kept = kept.cpu().double()  # not every GPU has float64
        if self.nucleus is not None:
            kept = self.nucleus(None, kept)
        sums = kept.softmax(dim=-1).cumsum(dim=-1)
        wanted = torch.tensor(draws, dtype=torch.float64)[:, None] * sums[:, -1:]
        drawn = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, drawn.to(scores.device)), 0)


def _likeliest(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Of scores (B, V) the highest `number` in each row and all that equal the last of them, with their tokens (B, K),
    in the vocabulary's order: which of equals a device finds first does not matter. Others among them are -inf.
    """
    lowest = scores.topk(min(number, scores.shape[1])).values[:, -1:]
    count = int((scores >= lowest).sum(dim=-1).max())
    tokens = scores.topk(count).indices.sort(dim=-1).values
    kept = scores.gather(1, tokens)
    return kept.where(kept >= lowest, -torch.inf), tokens
