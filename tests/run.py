"""Runs the tests, from nothing but Python: `python tests/run.py [arguments of pytest]` sets `.venv` up if needed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import environment

if __name__ == "__main__":
    sys.exit(environment.enter("requirements-dev.txt", ["-m", "pytest", *sys.argv[1:]], cwd=environment.ROOT))
