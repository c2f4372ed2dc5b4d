"""Models of the transformers package that make text of pictures, behind one interface."""

import copy
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from library.console import notice
from library.data.decode import BrokenImage
from library.errors import UserError
from library.preprocessing.captioning.sampling import Choice, generation_settings, logits_processors
from library.transfer import to_device

Inputs = dict[str, Tensor]

_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What models were taught to go on from; others are asked for nothing, chat models for a description.
_PROMPTS = {
    "blip": "a picture of ",
    "florence2": "<CAPTION>",
    "instructblip": "A short image description: ",
    "kosmos-2": "<grounding>An image of",
    "paligemma": "caption en",
}
_QUESTION = "Describe this picture in one sentence."
_LENGTH_WITH_PROMPT = ("blip", "git")  # whose lengths have always counted the beginning of the text and the prompt
_LONGEST = 100  # shorter sides, where a processor may scale the shorter one up and need memory for all of the other
_UNREADABLE = (ValueError, RuntimeError, IndexError, ArithmeticError)  # what processors make of such pictures
_BROKEN = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Captioner:
    """A model in memory, and how it reads pictures."""

    flag: str
    name: str
    model: Any
    device: torch.device
    reader: "Reader"
    prompt_length: int
    """Tokens of the prompt that count as part of a caption's length."""

    @property
    def place(self) -> str:
        """Where it computes, for people."""
        named = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{named}"

    @torch.inference_mode()
    def caption(self, choice: Choice, names: Sequence[str], inputs: Sequence[Inputs]) -> list[str]:
        """The captions of pictures from what `reader` made of each: with what `choice` says, of which drawing depends
        on the pictures' names and on nothing else. UserError if the device's memory does not suffice.

        Only pictures that need no padding go through the model together, so that none is seen by another.
        """
        captions: dict[int, str] = {}
        by_shape = [tuple((key, value.shape) for key, value in sorted(one.items())) for one in inputs]
        order = sorted(range(len(inputs)), key=lambda index: str(by_shape[index]))
        for _, group in groupby(order, key=by_shape.__getitem__):
            indices = list(group)
            texts = self._generate(choice, [names[index] for index in indices], [inputs[index] for index in indices])
            captions.update(zip(indices, texts, strict=True))
        return [captions[index] for index in range(len(inputs))]

    def _generate(self, choice: Choice, names: Sequence[str], inputs: Sequence[Inputs]) -> list[str]:
        batch = {key: self._moved(torch.cat([one[key] for one in inputs])) for key in inputs[0]}
        with self._memory_suffices(len(inputs)):
            tokens = self.model.generate(
                **batch,
                generation_config=generation_settings(choice, self.model, self.prompt_length),
                logits_processor=logits_processors(choice, self.model, names),
            )
        start = 0 if self.model.config.is_encoder_decoder else _prompt_width(tokens, batch.get("input_ids"))
        texts = self.reader.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _moved(self, tensor: Tensor) -> Tensor:
        return to_device(tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor, self.device)

    @contextmanager
    def _memory_suffices(self, size: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            smaller = "--batch_size: use a smaller one than" if size > 1 else "--precision: use fp16 or bf16, not even"
            raise UserError(f"{smaller} {size} at once fits into the memory of {self.device}") from error


def _prompt_width(tokens: Tensor, prompt: Tensor | None) -> int:
    """How many tokens (B, T) at the beginning are those of the prompt (B, P), of which BLIP replaces the first and
    drops the last. Models that begin with what they embedded return none of them.
    """
    widths = () if prompt is None else (prompt.shape[1], prompt.shape[1] - 1)
    return next((width for width in widths if torch.equal(tokens[:, 1:width], prompt[:, 1:width])), 0)


class Reader:
    """Makes what a model reads of a picture, in any thread."""

    def __init__(self, processor: Any, text: str | None, dropped: set[str], cut: bool):
        self.tokenizer = processor.tokenizer
        self._processor = copy.deepcopy(processor)  # only ever copied: neither tokenizers nor images mind threads then
        self._text = text
        self._dropped = dropped
        self._cut = cut
        self._own = threading.local()

    def __call__(self, pixels: np.ndarray) -> Inputs:
        """The model's inputs for a picture, uint8 RGB (H, W, 3), each with a batch of one. Raises BrokenImage for one
        that the model does not take, as too narrow a picture.
        """
        height, width = pixels.shape[:2]
        if max(height, width) > _LONGEST * min(height, width):
            raise BrokenImage(f"it is too narrow for the model ({width}x{height})")
        processor = getattr(self._own, "processor", None)
        if processor is None:
            processor = self._own.processor = copy.deepcopy(self._processor)
        try:
            # a list of lists: which pictures belong to which text, where one may have several
            made = processor(images=[[Image.fromarray(pixels)]], text=self._text and [self._text], return_tensors="pt")
        except _UNREADABLE as problem:
            raise BrokenImage(f"the model does not take it ({_first_line(problem)})") from None
        inputs = {key: value for key, value in made.items() if isinstance(value, Tensor) and key not in self._dropped}
        return {key: value[:, :-1] if self._cut and value.ndim == 2 else value for key, value in inputs.items()}


class _Pair:
    """The processor of a model that comes with one for images and a tokenizer, but none that joins them."""

    chat_template = None

    def __init__(self, flag: str, folder: Path):
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, images: Any, text: None, return_tensors: str) -> Any:
        return self.image_processor(images[0], return_tensors=return_tensors)


def load_captioner(flag: str, folder: Path, prompt: str | None, *, precision: str, device: torch.device) -> Captioner:
    """The model in a folder that `flag` names, ready to caption pictures, each caption going on from `prompt`, by
    default from what the kind of model was taught. UserError for what is missing, broken, or no such model.
    """
    with _explained(flag, folder, "its config.json or what belongs to it cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = _model_class(flag, folder, config)
        processor = _load_processor(flag, folder)
    dtype = _DTYPES[precision]
    if precision == "fp16" and device.type == "cpu":
        notice("the CPU computes in float32 where --precision fp16 is asked for")
        dtype = torch.float32
    with _explained(flag, folder, "its weights cannot be read, they are incomplete or of another model"):
        model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"{flag}: the weights in {folder} lack {missing[0]} and {len(missing) - 1} more tensors")
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"--precision: the model does not fit into the memory of {device} as {precision}") from error
    reader, prompt_length = _reader(flag, folder, model, processor, prompt)
    return Captioner(flag, str(folder), model, device, reader, prompt_length)


def _model_class(flag: str, folder: Path, config: Any) -> Any:
    """What reads the weights: the class that transformers has for such models, else the one that the config names."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if named is not None and named.can_generate() and "pixel_values" in signature(named.forward).parameters:
        return named
    raise UserError(f"{flag}: the model in {folder} ({config.model_type}) does not make text of pictures")


def _load_processor(flag: str, folder: Path) -> Any:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    whole = hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    return processor if whole else _Pair(flag, folder)


def _reader(flag: str, folder: Path, model: Any, processor: Any, prompt: str | None) -> tuple[Reader, int]:
    """(what reads pictures, tokens of the prompt that count), after it has read one."""
    kind = model.config.model_type
    text = _PROMPTS.get(kind) if prompt is None else prompt or None
    if processor.chat_template is not None:
        content = [{"type": "image"}, {"type": "text", "text": text or _QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif text and isinstance(processor, _Pair):
        raise UserError(f"--prompt: the model in {folder} ({kind}) takes none, leave it out")
    dropped = {"token_type_ids"} - signature(model.forward).parameters.keys()
    sample = np.full((64, 64, 3), 255, np.uint8)
    try:
        inputs = Reader(processor, text, dropped, False)(sample)
    except (BrokenImage, TypeError, AttributeError) as problem:
        raise UserError(
            f"--prompt: the processor in {folder} ({kind}) makes nothing of a picture and "
            f"{'no prompt' if text is None else repr(text)} ({_first_line(problem)})"
        ) from problem
    tokens = inputs["input_ids"][0].tolist() if "input_ids" in inputs else []
    ends = {processor.tokenizer.sep_token_id, processor.tokenizer.eos_token_id} - {None}
    # a text that has come to its end is not gone on from; BLIP drops the end itself
    cut = len(tokens) > 1 and tokens[-1] in ends and kind != "blip" and not model.config.is_encoder_decoder
    reader = Reader(processor, text, dropped, cut)
    if kind not in _LENGTH_WITH_PROMPT or processor.chat_template is not None:
        return reader, 0
    return reader, max(len(tokens) - (cut or kind == "blip"), 1)


@contextmanager
def _explained(flag: str, folder: Path, what: str) -> Iterator[None]:
    """Errors of transformers as one sentence."""
    try:
        yield
    except UserError:
        raise
    except ImportError as problem:
        raise UserError(f"{flag}: the model in {folder} cannot be used here: {_first_line(problem)}") from problem
    except (*_BROKEN, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{flag}: the model in {folder} cannot be used, {what} ({_first_line(problem)})") from problem


def _first_line(problem: BaseException) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
