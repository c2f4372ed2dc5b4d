"""What the processes of a run do together besides training: wait for each other, tell each other, end together.

All of it goes over a connection of its own that nobody minds to be silent for days: the one for gradients gives up a
process that is not heard of for minutes, however good its reason. A process that dies closes both at once.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from library.errors import UserError

Value = TypeVar("Value")

_PATIENCE = timedelta(days=30)
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|socket|remote process (exited|has terminated)", re.I)
_LATE = re.compile(r"timed? ?out", re.I)
_connection: tuple[Any, Any] | None = None  # the connection, and the processes it is between


def connect() -> None:
    """Open the connection. All processes have to, at the same time; one alone needs none."""
    global _connection
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        _connection = distributed.new_group(backend="gloo", timeout=_PATIENCE), distributed.group.WORLD


def is_first() -> bool:
    """Whether this process is the one that does what is to be done once."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def wait() -> None:
    """Return when all processes have called this, however long that takes."""
    group = _group()
    if group is not None:
        distributed.barrier(group)


def gather(value: Value) -> list[Value]:
    """Each process's value, by rank, in all of them."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group)
    return values


def first_says(value: Value) -> Value:
    """The first process's value, in all of them."""
    group = _group()
    if group is None:
        return value
    values = [value]
    distributed.broadcast_object_list(values, 0, group)
    return values[0]


def any_of(flags: Sequence[bool]) -> Callable[[], list[bool]]:
    """Tell the other processes one's flags, of which all have as many. Ask the answer at a later time: it says which
    of them any process has raised.
    """
    told, group = torch.tensor(flags, dtype=torch.uint8), _group()
    work = None if group is None else distributed.all_reduce(told, distributed.ReduceOp.MAX, group, async_op=True)

    def answer() -> list[bool]:
        if work is not None:
            work.wait()
        return list(map(bool, told.tolist()))

    return answer


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
    """UserError in place of what a library says inside when another process of the run has gone, or is not heard of."""
    try:
        yield
    except RuntimeError as error:
        group, said = _group(), str(error)
        if group is not None and _LOST.search(said):
            raise UserError(
                "another process of this run has ended, so this one ends, too: it says why, unless it was killed, as "
                "systems do when memory runs out"
            ) from error
        if group is not None and _LATE.search(said):
            raise UserError(
                "another process of this run was not heard of for too long: see whether it hangs, or allow more "
                "minutes with --ddp_timeout"
            ) from error
        raise


def _group() -> Any:
    """The connection, None if this process is alone."""
    if _connection is None or not distributed.is_initialized() or _connection[1] is not distributed.group.WORLD:
        return None
    return _connection[0]
