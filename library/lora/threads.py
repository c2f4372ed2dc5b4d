"""Work on many layers at once, whose results do not depend on how many threads there are.

Sums of floating-point numbers change in their last bits with the number of threads that share one. So each layer is
worked on by a single one, and several layers at the same time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from library.ahead import ahead

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # layers at once: each takes memory


@contextmanager
def one_thread_each() -> Iterator[int]:
    """While it lasts, torch computes in this thread alone; yields how many it may use otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in their order; as many at once as torch has threads. Items are taken from `items` in
    the caller's thread, a few before they are needed.
    """
    with one_thread_each() as threads:
        # a new thread starts with the number of the whole process
        yield from ahead(function, items, min(threads, _MOST), start=torch.set_num_threads, start_with=(1,))
