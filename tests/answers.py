"""What a model answers: the live one of a run whenever that saves, and those made of the saved files elsewhere.

A program for the fork server. `train FOLDER SCRIPT WORDS...` runs a script, and beside each file that it saves the live
model's answers go into FOLDER, under the file's stem. `load ORDER` answers for saved files; the order is that of
`ORDER`, as JSON.
"""

import importlib
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.models import float8
from library.models.added_words import AddedRows, read_embedding
from library.models.family import Family
from library.models.registry import load_model
from library.models.text import VOCABULARY_SIZE
from library.models.word_folder import WORDS
from library.training.device.precision import MIXED
from library.training.saving import Saver
from library.training.step import TrainingStep
from tests.trained import with_lora

CAPTIONS = ("a red circle", "sks, a big blue square of zwx")
RAW = "raw "
"""Before the stem, where the answers are those of the weights that are trained."""


class Order(TypedDict):
    """Which files are to answer, and what they go with: the model `base`, as a run with these flags holds it."""

    files: list[str]
    kind: str  # "model", "network" or "word"
    base: str
    mixed_precision: str
    fp8_base: bool
    folder: str  # where the answers go


def main() -> None:
    order, *words = sys.argv[1:]
    if order == "load":
        return load(json.loads(words[0]))
    folder, script, *own = words
    listen(Path(folder))
    sys.argv = [f"{script}.py", *own]
    return importlib.import_module(script).main()


@torch.no_grad()
def answers(model: Family, *, paints: bool) -> dict[str, Tensor]:
    """Of a float32 model in evaluation mode: texts, what is predicted of noise with them and, if it `paints`, what the
    autoencoder makes of that.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, model.latents.channels, 16, 16, generator=generator)
    text = model.encode_text(CAPTIONS)
    condition = model.condition(text, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2))
    prediction = model.denoise(noise, torch.tensor([100, 900]), condition)
    painted = {"painted": model.decode_latents(prediction)} if paints else {}
    found = {**text, "prediction": prediction, **painted}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def live(step: TrainingStep, saved: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The answers of a run's model with the weights it has now, those of `saved` as they are in a file of this type.
    Afterwards all is as it was.
    """
    tensors = [tensor for tensor in (*step.parameters(), *step.buffers()) if tensor.is_floating_point()]
    own, modes = [tensor.data for tensor in tensors], [(module, module.training) for module in step.modules()]
    in_file = {id(tensor) for tensor in (*saved.parameters(), *saved.buffers())}
    try:
        for tensor in tensors:
            tensor.data = (tensor.data.to(dtype) if id(tensor) in in_file else tensor.data).float()
        return answers(step.eval().model, paints=saved is step.model)
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data
        for module, training in modes:
            module.training = training


def listen(folder: Path) -> None:
    """Have the live model answer whenever a file is saved, with the weights that are trained and with those that are
    published.
    """
    make, write = Saver.__init__, Saver._write_once

    def made(self, options, target, method, *others):
        make(self, options, target, method, *others)
        save = method.save

        def answered(stem, dtype, metadata):
            note(self, stem.name)
            return save(stem, dtype, metadata)

        method.save = answered

    def written(self, stem, progress):
        note(self, f"{RAW}{stem}")
        return write(self, stem, progress)

    def note(self, name):
        step = self.state.step
        save_file(live(step, self.method.saved(step.model, step.trained), self.dtype), folder / f"{name}.safetensors")

    Saver.__init__, Saver._write_once = made, written


def load(order: Order) -> None:
    """The answers for saved files and, as `base`, those of what they go with."""
    for file in order["files"]:
        model = with_file(Path(file), order)
        save_file(
            answers(model, paints=order["kind"] == "model"), Path(order["folder"], f"{Path(file).stem}.safetensors")
        )
    save_file(answers(base_of(order), paints=order["kind"] == "model"), Path(order["folder"], "base.safetensors"))


def base_of(order: Order) -> Family:
    model = load_model(order["base"], MIXED[order["mixed_precision"]])
    if order["fp8_base"]:
        float8.store_in_8_bits(model.unet)
        float8.store_in_8_bits(model.text_encoders)
    return model.float()


def with_file(file: Path, order: Order) -> Family:
    if order["kind"] == "model":
        return load_model(file)
    model = base_of(order)
    return with_lora(model, file) if order["kind"] == "network" else with_word(model, file)


def with_word(model: Family, file: Path) -> Family:
    """The model with "sks" read as the vectors of a Textual Inversion, or the words of a folder as those of theirs."""
    widths = {
        name: encoder.clip.config.hidden_size
        for name, encoder in zip(model.embedding_names, model.text_encoders, strict=True)
    }
    files = json.loads((file / WORDS).read_text()) if file.is_dir() else {"sks": ""}
    rows: Mapping[str, Mapping[str, Tensor]] = {word: read_embedding(file / own, widths) for word, own in files.items()}
    model.words = nn.ModuleList(AddedRows(torch.cat([own[name] for own in rows.values()])) for name in widths)
    ids, firsts = {}, itertools.count(VOCABULARY_SIZE)
    for word, own in rows.items():
        ids[word] = list(itertools.islice(firsts, len(next(iter(own.values())))))
    model.add_words(ids, list(model.words))
    return model
