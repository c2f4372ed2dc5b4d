"""The words this program was started with, as others see them."""

import contextlib
import ctypes
import sys
from pathlib import Path

_PROC = Path("/proc/self")
_ARG_START = 45  # among the fields of `stat` that follow the program's name, see proc_pid_stat(5)


def hide(secret: str) -> bool:
    """Black a secret out of this program's arguments, and tell whether it was among them.

    In `sys.argv`, which trackers record; on Linux also in what `ps` shows of this process, though not of a launcher.
    """
    found = any(secret in word for word in sys.argv)
    for words in (sys.argv, sys.orig_argv):
        words[:] = [word.replace(secret, "*" * len(secret)) for word in words]
    with contextlib.suppress(OSError, ValueError, IndexError):  # no Linux, or one that does not show its addresses
        _hide_from_ps(secret.encode())
    return found


def _hide_from_ps(secret: bytes) -> None:
    """Overwrite it in the memory that the kernel shows as the command line."""
    start, end = map(int, (_PROC / "stat").read_text().rpartition(")")[2].split()[_ARG_START : _ARG_START + 2])
    shown = (_PROC / "cmdline").read_bytes()
    if not start or end - start != len(shown):  # the title was replaced by something else
        return
    at = shown.find(secret)
    while at >= 0:
        ctypes.memset(start + at, ord("*"), len(secret))
        at = shown.find(secret, at + len(secret))
