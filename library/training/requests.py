"""What is asked of a run while it goes on: by signals, and by words in a file."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from accelerate import Accelerator

from library.console import warn
from library.errors import suggest
from library.training import together

WORDS = ("save", "sample", "stop")
# Signals that end a run, with what this system has of them.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_REQUESTS = (*WORDS, *(number.name for number in _ENDING))
_PATIENCE = 0.2  # seconds between two looks at the file
_ANSWER = b"\nthe run will be saved after this step and ends then; a second time ends it at once\n"
_ANSWER_AT_END = b"\nthe run ends as soon as its last files are written; a second time ends it at once\n"


class RunEnded(Exception):
    """The run ends before its last step: it is `complete` all the same, or saved to be gone on with. Carries a
    sentence, and the program's exit status.
    """

    def __init__(self, message: str, status: int = 0, *, complete: bool = False):
        super().__init__(message)
        self.status = status
        self.complete = complete


class Requests:
    """Signals and a control file, as all processes of a run see them after the same step."""

    def __init__(self, control_file: Path, accelerator: Accelerator):
        self.control_file = control_file
        self.accelerator = accelerator
        self.noted: set[str] = set()
        self.looked = 0.0
        self.answer = _ANSWER
        self.on_the_way: Callable[[], list[bool]] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, a first Ctrl-C, SIGTERM or hang-up is a request; a second one of a kind ends the process."""
        before = {number: signal.getsignal(number) for number in _ENDING}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.noted.add(signal.Signals(number).name)
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        with suppress(OSError):  # past all that may just be writing there
            os.write(2, self.answer)

    def no_more_steps(self) -> None:
        """From here on nothing is asked of the run that it does not do anyway."""
        self.answer = _ANSWER_AT_END

    def heard(self) -> set[str]:
        """What is asked for by now, of any process: `save`, `sample`, `stop` or a signal's name, each once.

        With several processes it is what was asked for one step ago, so that nobody has to wait for the others.
        """
        if self.accelerator.is_main_process:
            self._read_file()
        if self.accelerator.num_processes == 1:
            heard, self.noted = self.noted, set()
            return heard
        flags = self.on_the_way() if self.on_the_way else [False] * len(_REQUESTS)
        mine, self.noted = self.noted, set()
        self.on_the_way = together.any_of([request in mine for request in _REQUESTS])
        return {request for request, flag in zip(_REQUESTS, flags, strict=True) if flag}

    def _read_file(self) -> None:
        """Note the words in the control file, and take it away. An empty one may just be being written."""
        now = time.monotonic()
        if now - self.looked < _PATIENCE:
            return
        self.looked = now
        # what is written from here on is another file, to be read the next time
        taken = self.control_file.with_name(f"{self.control_file.name}.{os.getpid()}.tmp")
        try:
            if not self.control_file.stat().st_size:
                return
            os.replace(self.control_file, taken)
            content = taken.read_bytes()
            taken.unlink()
            words = content.decode().split()
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as problem:
            warn(f"{self.control_file} cannot be obeyed: {problem}")
            return
        for word in words:
            if word in WORDS:
                self.noted.add(word)
            else:
                warn(f"{self.control_file}: {word!r} is none of {', '.join(WORDS)}{suggest(word, WORDS)}")


def _leave_terminal() -> None:
    """Nobody is there any more: what is printed from now on must not fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
