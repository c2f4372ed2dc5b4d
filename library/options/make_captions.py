"""Captions by BLIP, or by any other model that makes text of pictures."""

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.options.base import option
from library.options.captioning import CaptioningOptions

BLIP = "Salesforce/blip-image-captioning-large"


@dataclass(frozen=True)
class MakeCaptionsOptions(CaptioningOptions):
    """Which model writes the captions, and how it chooses its words."""

    title: ClassVar[str] = "making captions"

    caption_weights: str | None = option(
        None, f"BLIP model: a repository of the Hugging Face hub or a folder [{BLIP}]", metavar="MODEL"
    )
    model_id: str | None = option(
        None,
        "any other model of the transformers package that makes text of pictures: a repository or a folder",
        metavar="MODEL",
    )
    prompt: str | None = option(
        None, "what a caption goes on from, which is not written; of a chat model the question", metavar="TEXT"
    )
    beam_search: bool = option(False, "search for the likeliest caption instead of drawing its words")
    num_beams: int = option(1, "captions that --beam_search has in view; 1 takes each likeliest word", minimum=1)
    top_p: float = option(0.9, "draw from the likeliest words that together have this share of the chances")
    max_length: int = option(75, "tokens of a caption, at most", metavar="N", minimum=1)
    min_length: int = option(5, "tokens of a caption, at least", metavar="N", minimum=0)
    seed: int = option(42, "other captions are drawn with another one", metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption_weights is not None and self.model_id is not None:
            raise UserError("--model_id and --caption_weights each name a model, give one of them")
        if self.caption_weights is not None and self.caption_weights.lower().endswith(".pth"):
            raise UserError(
                f"--caption_weights: {self.caption_weights} is in the layout of the BLIP authors' own code, which is "
                f"not read here; the same weights are the repository {BLIP} of the hub (large) and "
                f"{BLIP.removesuffix('large')}base: name one of them, or leave the flag out for the large one"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p: {self.top_p} is no share, give a number above 0 and up to 1")
        if self.min_length > self.max_length:
            raise UserError(f"--min_length: {self.min_length} is more than --max_length, {self.max_length}")

    @property
    def model(self) -> tuple[str, str]:
        """The flag that names the model, and its name."""
        if self.model_id is not None:
            return "--model_id", self.model_id
        return "--caption_weights", self.caption_weights or BLIP
