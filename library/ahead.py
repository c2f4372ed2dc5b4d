"""Work done by threads ahead of whoever wants it, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    waiting: int | None = None,
    start: Callable[..., Any] | None = None,
    start_with: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`function` of each item, in their order, by up to `threads` at once; items are taken in the caller's thread, a
    few before they are needed. At most `waiting` results are kept for later, by default as many as there are threads.

    Each thread begins with `start(*start_with)`. Whoever stops asking stops the work: nothing further is begun.
    """
    waiting = threads if waiting is None else waiting
    with ThreadPoolExecutor(threads, initializer=start, initargs=start_with) as pool:
        results: deque[Future[Result]] = deque()
        try:
            for item in items:
                results.append(pool.submit(function, item))
                if len(results) > waiting:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
