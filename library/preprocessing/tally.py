"""What becomes of the pictures that a tool works on."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from library.ahead import ahead as by_threads
from library.bars import progress_bar
from library.console import long_list, warn
from library.data.decode import BrokenImage
from library.errors import UserError, some

Result = TypeVar("Result")
Item = TypeVar("Item")

_LISTED = 20  # failed files at the end
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class Tally:
    """How many files a tool has written, how many were there already, and which pictures failed.

    As a context it tells how far the work came if that is broken off, by Ctrl-C or an error, before its end is told.
    """

    written: int = 0
    skipped: int = 0
    failed: list[Path] = field(default_factory=list)
    told: bool = False

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and not self.told and (self.written or self.skipped or self.failed):
            print(f"so far: {self._counts()}", flush=True)

    def fail(self, picture: Path, reason: object) -> None:
        """Leave a picture out, with a warning."""
        warn(f"{picture}: {reason}: it is left out")
        self.failed.append(picture)

    def tell(self, what: str, where: str = "") -> None:
        """Print the end's one line: what was written, skipped and failed, and on which device or by what. UserError if
        there is nothing to show for it.
        """
        self.told = True
        failed = f" ({shown(some(list(map(os.fspath, self.failed)), _LISTED))})" if self.failed else ""
        place = f", on {where}" if where else ""
        print(f"{what}: {self._counts()}{failed}{place}", flush=True)
        if not self.written and not self.skipped:
            raise UserError(f"no {what} are written{': none of the pictures could be used' if self.failed else ''}")

    def _counts(self) -> str:
        return f"{self.written} written, {self.skipped} skipped, {len(self.failed)} failed"


def shown(text: object) -> str:
    """A text with file names, for `print`: what the console cannot show, as bytes that are no UTF-8, is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return str(text).encode(encoding, "backslashreplace").decode(encoding)


def say(text: object) -> None:
    """Print a text above the bar, if there is a console at all."""
    if sys.stdout is not None:
        with long_list():
            tqdm.write(shown(text), file=sys.stdout)


def prepared(
    pictures: Sequence[Path],
    prepare: Callable[[Path], Result],
    tally: Tally,
    *,
    threads: int,
    doing: str,
    ahead: int = 0,
) -> Iterator[tuple[Path, Result]]:
    """Each picture with what `prepare` makes of it, in order, by threads ahead of whoever wants it, under a bar that
    says what is `doing`. Whoever takes them in batches has as many more `ahead`, so that a whole one is ready when the
    last is done. A picture for which it raises BrokenImage, or OSError since it is gone or may not be read, is
    left out and counted as failed. UserError if the disk is full or the memory too small: that is no picture's fault.
    """

    def attempt(picture: Path) -> Result | BrokenImage:
        try:
            return prepare(picture)
        except BrokenImage as problem:
            return problem
        except OSError as problem:
            reason = problem.strerror or str(problem)
            if problem.errno in _OF_THE_DISK:
                raise UserError(f"{problem.filename or picture}: {reason}") from None
            return BrokenImage(reason)
        except MemoryError:
            raise UserError(
                f"{picture}: there is not enough memory for it: give a smaller --max_data_loader_n_workers, or close "
                "other programs"
            ) from None

    with progress_bar(total=len(pictures), desc=doing, unit="img") as bar:
        results = by_threads(attempt, pictures, threads, waiting=2 * threads + ahead)
        for picture, result in zip(pictures, results, strict=True):
            if isinstance(result, BrokenImage):
                tally.fail(picture, result)
            else:
                yield picture, result
            bar.update()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, of which the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
