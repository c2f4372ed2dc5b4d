"""Words that a model did not know: vectors beyond the table of its tokens, and the files that keep them.

A Textual Inversion (Gal et al. 2022, arXiv:2208.01618) is a few such vectors for one word.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.errors import UserError
from library.models.files.checkpoint import open_weights
from library.models.text import VOCABULARY_SIZE


class AddedRows(nn.Module):
    """The vectors (n, width) of the ids behind CLIP's vocabulary, made in float32 whatever the model is in."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().to(torch.float32, copy=True))

    def extend(self, table: nn.Embedding) -> None:
        """Have the table of an encoder give these vectors for their ids. Its own weights stay as they are: neither
        gradients nor weight decay reach them, and it is saved as before.
        """
        plain = table.forward

        def forward(ids: Tensor) -> Tensor:
            vectors = plain(ids.clamp(max=VOCABULARY_SIZE - 1))
            # looked up in every caption, so that every process has a gradient, of zeros where no caption has the word
            added = functional.embedding((ids - VOCABULARY_SIZE).clamp(min=0), self.rows)
            return torch.where((ids >= VOCABULARY_SIZE).unsqueeze(-1), added.to(vectors.dtype), vectors)

        table.forward = forward


def first_rows(table: nn.Embedding, ids: Sequence[int], count: int) -> Tensor:
    """(count, width) float32 to start from: the vectors of `ids`, in turn; without any, drawn from torch's global
    generator like those of the table.
    """
    known = table.weight.detach().float()
    if ids:
        return known[[ids[number % len(ids)] for number in range(count)]]
    drawn = torch.randn(count, table.embedding_dim, device="meta" if known.is_meta else "cpu").to(known.device)
    return known.mean(dim=0) + known.std(dim=0) * drawn


def read_embedding(path: str | os.PathLike, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The vectors (n, width) in a file of a Textual Inversion by the names in `widths`, which gives their widths. The
    name does not matter where there is one only: programs differ. UserError if it is no such file, or for other models.
    """
    with open_weights(path) as file:
        file.verify()
        tensors = {name: file.get(name, torch.float32) for name in file.keys()}  # noqa: SIM118
    if len(tensors) == len(widths) == 1:
        tensors = dict(zip(widths, tensors.values(), strict=True))
    if tensors.keys() != widths.keys() or any(tensor.ndim not in (1, 2) for tensor in tensors.values()):
        raise UserError(f"{path} is no Textual Inversion for this model: there should be {' and '.join(widths)} in it")
    rows = {name: torch.atleast_2d(tensors[name]) for name in widths}
    for name, width in widths.items():
        if rows[name].shape[1] != width:
            raise UserError(
                f"{path} is a Textual Inversion for another kind of model: its vectors have {rows[name].shape[1]} "
                f"values, and those of this model have {width}"
            )
    counts = {len(own) for own in rows.values()}
    if len(counts) > 1:
        raise UserError(f"{path} has different numbers of vectors for the text encoders: {sorted(counts)}")
    return rows
