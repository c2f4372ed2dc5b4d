"""Programs of their own, with nothing of pytest around their console."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
ACCELERATE = ("accelerate", "launch", "--num_cpu_threads_per_process", "1")


def run(command: Sequence[str | Path], timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, with the repository as its folder."""
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A few lines of Python."""
    return run([sys.executable, "-c", textwrap.dedent(code)], 60, **environment)


def train_script(
    words: Sequence[str], launcher: Sequence[str] = ("python",), script: str = "train_network.py"
) -> subprocess.CompletedProcess[str]:
    """A script with these arguments as a user without a GPU starts it; `launcher` lies beside this Python."""
    program, *options = launcher
    command = [Path(sys.executable).parent / program, *options, script, *words]
    return run(command, 300, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
