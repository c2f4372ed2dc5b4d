"""Command lines as a user would type them: how they are shown, and run."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from library.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ("accelerate", "launch")


def run(command: Sequence[str]) -> None:
    """Run a command that begins with LAUNCH, by this Python's own accelerate. UserError if it fails."""
    if subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *command[2:]]).returncode:
        raise UserError("training failed, see the message above")


def shortest(path: Path) -> Path:
    """The path from here where it lies below, else from the root."""
    path = path.absolute()  # a virtual environment's Python must not be resolved to the one it was made from
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quoted(command: Sequence[str]) -> str:
    """A command as this system's shell takes it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def show(command: Sequence[str]) -> str:
    """A command over several lines."""
    end = " ^\n  " if os.name == "nt" else " \\\n  "
    return end.join([quoted(command[:4]), *(quoted([word]) for word in command[4:])])
