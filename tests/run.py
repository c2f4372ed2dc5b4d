"""Runs the tests, from nothing but Python: `python tests/run.py [arguments of pytest]` sets `.venv` up if needed.

Each processor takes one test file after the other; `-n 0` runs them all in one process, as a debugger needs it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import environment

if __name__ == "__main__":
    pytest = ["-m", "pytest", "-n", "auto", "--dist", "loadfile", *sys.argv[1:]]
    sys.exit(environment.enter("requirements-dev.txt", pytest, cwd=environment.ROOT))
