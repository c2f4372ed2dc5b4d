"""--deterministic: a run that repeats itself bit for bit, or says which operation stands in the way."""

import contextlib
import re
from collections.abc import Iterator

import torch

from library.errors import UserError

_NO_SUCH_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


def settle(wanted: bool) -> None:
    """Have torch choose operations that repeat themselves, or any. cuBLAS reads CUBLAS_WORKSPACE_CONFIG, too, when it
    starts.
    """
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """UserError for an operation that never repeats itself, in place of torch's error."""
    try:
        yield
    except RuntimeError as error:
        found = _NO_SUCH_KERNEL.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"{found[1]} cannot be computed so that it repeats itself on this device: train without --deterministic"
        ) from error
