"""How far something has come: a bar that is drawn over itself, or plain lines for programs that read along."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from library import console

_PAUSE = 10  # seconds between two lines
_LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """As much of tqdm as is used here, with the same arguments: says at most every 10 seconds how far it is, and at the
    end, if that took longer than `delay` seconds.
    """

    def __init__(
        self,
        iterable: Iterable[Any] = (),
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "it",
        disable: bool = False,
        delay: float = 0,
        **of_bars_only: Any,
    ):
        self.iterable = iterable
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.initial = self.n = self.said = initial
        self.desc = desc
        self.unit = unit
        self.disable = disable
        self.postfix = ""
        self.started = time.monotonic()
        self.next_line = self.started + max(delay, _PAUSE)
        self.worth_an_end = self.started + delay

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() >= self.next_line:
            self._say()

    def close(self) -> None:
        if self.n > self.said and time.monotonic() >= self.worth_an_end:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        self.next_line = now + _PAUSE
        self.said = self.n
        if not self.disable:
            text = tqdm.format_meter(
                self.n,
                self.total,
                now - self.started,
                prefix=self.desc,
                unit=self.unit,
                postfix=self.postfix,
                initial=self.initial,
                bar_format=_LINE,
            )
            print(text, file=sys.stderr, flush=True)


def progress_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> tqdm | Lines:
    """A progress bar with tqdm's arguments, or lines if --console_log_simple asks for them."""
    if console.plain:
        return Lines(iterable or (), **arguments)
    return tqdm(iterable, **arguments)
