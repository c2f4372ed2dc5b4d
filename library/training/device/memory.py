"""Memory that runs out: said in one sentence, with what to lower."""

import contextlib
import re
from collections.abc import Iterator

import torch

from library.data.plan import BatchPlan
from library.errors import UserError

STEP_ADVICE = "lower --train_batch_size or --resolution, or use --gradient_checkpointing or --cache_latents"
PICTURE_ADVICE = "lower --w and --h of the prompts in --sample_prompts"
# What torch says on the CPU and on a Mac, and what NVIDIA's libraries say, where it is no OutOfMemoryError.
_RAN_OUT = re.compile(r"can't allocate memory|not enough memory|out of memory|_ALLOC_FAILED", re.I)


@contextlib.contextmanager
def enough_for(what: str, advice: str) -> Iterator[None]:
    """UserError with the advice if memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or _RAN_OUT.search(str(error))
        ):
            raise
        raise UserError(f"there is not enough memory for {what}: {advice}") from error


def step_of(plan: BatchPlan) -> str:
    """A step that ends with this micro-batch, as in a sentence."""
    width, height = plan.bucket
    count = len(plan.items)
    return f"a step with {count} image{'s' * (count > 1)} of {width}x{height} at a time"
