"""What the user reads on the console: one-line messages on stderr, and nothing of what dependencies print.

Of several processes only the first one speaks, errors excepted: those may concern any of them.
"""

import contextlib
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from library.errors import UserError

if TYPE_CHECKING:
    from library.options.console import ConsoleOptions

_KEPT = 1000  # messages that a log file opened later begins with


class _Console(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if bar is not None:
            bar.write(self.format(record), file=sys.stderr)
        else:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _LogFile(logging.Handler):
    """Appends to a log file, which begins with what was said while there was none."""

    path: Path | None = None
    stream: TextIO | None = None

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        self.before: deque[logging.LogRecord] = deque(maxlen=_KEPT)

    def open(self, path: Path | None) -> None:
        if self.stream is not None:
            self.stream.close()
        self.path, self.stream = path, None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.stream = path.open("a", encoding="utf-8")
            except OSError as problem:
                raise UserError(f"{path}: this log file cannot be written ({problem.strerror})") from None
            for record in self.before:
                self.emit(record)
        self.before.clear()

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None:
            self.before.append(record)
        else:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop what is going on
                self.stream.write(self.format(record) + "\n")
                self.stream.flush()


_said: set[str] = set()
plain = False  # whether progress is told in lines of its own rather than by bars that are drawn over and over
_console = _Console()
_log_file = _LogFile()  # the run's own
_chosen_file = _LogFile()  # that of --console_log_file
_messages = logging.getLogger("library.console")
_messages.handlers = [_console, _log_file, _chosen_file]
_messages.setLevel(logging.INFO)
_messages.propagate = False


def rank() -> int:
    """The number of this process among those of the run, as `accelerate launch` and `torchrun` tell it."""
    number = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    return max(int(number), 0)


def setup(log_file: Path | None) -> None:
    """Send messages to `log_file`, too, and what dependencies log or warn about only there, or nowhere without one.

    May be called again, for another file. Raises UserError if the file cannot be written.
    """
    _log_file.open(log_file if rank() == 0 else None)
    for handler in (_log_file, _chosen_file):
        logging.getLogger().addHandler(handler)  # a second time does nothing
    logging.captureWarnings(True)  # Python's warnings reach the root logger instead of stderr


def configure(options: "ConsoleOptions") -> None:
    """Show and keep what the user wants, from the beginning. Raises UserError if the file cannot be written."""
    global plain
    _said.clear()
    plain = options.console_log_simple
    level = options.console_log_level or "INFO"
    _console.setLevel(min(logging.getLevelName(level), logging.ERROR))  # why a program stops is always said
    if level == "DEBUG":
        logging.getLogger().addHandler(_console)
    else:
        logging.getLogger().removeHandler(_console)
    wanted = options.console_log_file is not None and rank() == 0
    _chosen_file.open(Path(options.console_log_file) if wanted else None)


def notice(message: str) -> None:
    """Tell the user something worth knowing, once however often it is said."""
    _say(logging.INFO, message)


def warn(message: str, *, of_any_process: bool = False) -> None:
    """Tell the user of something that is probably not meant, once however often it is said.

    `of_any_process`: what only the process that meets it can tell.
    """
    _say(logging.WARNING, f"warning: {message}", of_any_process)


def error(message: str) -> None:
    """Say why the program stops. Every process says it, since it may be the only one."""
    place = f" (process {rank()})" if rank() else ""
    _messages.error("error%s: %s", place, message)


def _say(level: int, message: str, of_any_process: bool = False) -> None:
    if (rank() == 0 or of_any_process) and message not in _said:
        _said.add(message)
        _messages.log(level, "%s", message)


@contextlib.contextmanager
def long_list() -> Iterator[None]:
    """Print a long list inside: a program that reads it, such as `head`, may end when it has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def quiet_dependencies(log_file: Path | None = None) -> Iterator[None]:
    """Keep off the console whatever is printed inside, by Python or by C code; wrap imports of large packages in this.

    It goes to `log_file`, else to the files of `setup` and `configure`, else nowhere. Loggers that packages set up
    inside keep quiet afterwards, too. File descriptors 1 and 2 are redirected rather than `sys.stdout` and
    `sys.stderr`, because packages hold on to those for later. Raises OSError if `log_file` cannot be written.
    """
    known = {id(handler) for _, handler in _console_handlers()}
    _flush()
    with contextlib.ExitStack() as restore:
        copies = {}
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # closed, as in a program without a console
                copies[descriptor] = os.dup(descriptor)
                restore.callback(_restore, descriptor, copies[descriptor])
        files = [log_file] if log_file else [file.path for file in (_log_file, _chosen_file) if file.path]
        path, *others = files or [None]
        sink = os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for other in others:
            restore.callback(_append, other, path, os.fstat(sink).st_size)
        for descriptor in copies:
            os.dup2(sink, descriptor)
        os.close(sink)
        restore.callback(_flush)  # runs first: what is still buffered belongs into the sink
        yield
    for logger, handler in _console_handlers():
        if id(handler) not in known:
            logger.removeHandler(handler)
            logger.addHandler(_log_file)
            logger.addHandler(_chosen_file)


def _append(file: Path, source: Path, start: int) -> None:
    """Add what `source` holds from byte `start` on."""
    with source.open("rb") as read, file.open("ab") as write:
        read.seek(start)
        shutil.copyfileobj(read, write)


def _restore(descriptor: int, copy: int) -> None:
    os.dup2(copy, descriptor)
    os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, broken or closed
            stream.flush()


def _console_handlers() -> list[tuple[logging.Logger, logging.Handler]]:
    """The handlers of any logger that write to the console, ours excepted."""
    console = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    return [
        (logger, handler)
        for logger in loggers
        if isinstance(logger, logging.Logger)  # not the placeholders of names that nobody uses
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in console
    ]
