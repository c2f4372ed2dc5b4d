"""The first run, from nothing but Python: sets `.venv` up if needed and runs examples/quickstart.py in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import environment

if __name__ == "__main__":
    job = environment.ROOT / "examples" / "quickstart.py"
    sys.exit(environment.enter("requirements.txt", [str(job), *sys.argv[1:]]))
