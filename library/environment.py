"""One-command set-up: a `.venv` beside the code that holds the pinned requirements.

Runs before anything is installed, so it uses the standard library alone; and it has to start on Pythons that are
too old for the rest, in order to say so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # not subscriptable on the old Pythons that only get as far as being refused
    Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 11), (3, 14)  # the Pythons that every pinned package has wheels for

WHEEL_INDEX = "https://download.pytorch.org/whl/"
# What PyPI itself holds under torch's version. Other builds come from an index of PyTorch's own.
PYPI_BUILD = {"Linux": "cu130", "Windows": "cpu"}
DISK_GB = {"cpu": 4, "cuda": 12}  # installed 1.8 and about 6; the rest is downloads, which pip keeps beside it


class SetupError(Exception):
    """The set-up cannot go on. The text is one sentence: what is wrong and what to do."""


class Card(NamedTuple):
    """An NVIDIA card as its driver describes it."""

    name: str
    capability: tuple[int, int]
    driver: int | None = None  # major version


# --- What this machine needs: decisions on plain data ---


def check_python(version: tuple[int, int], bits: int, system: str, machine: str) -> None:
    """Raises SetupError when no set of wheels exists for this interpreter."""
    if not OLDEST <= version <= NEWEST or bits != 64:
        have, oldest, newest = (".".join(map(str, v)) for v in (version, OLDEST, NEWEST))
        raise SetupError(
            f"this is a {bits}-bit Python {have}, but the pinned packages need a 64-bit Python {oldest} to {newest}: "
            f"start the script with one of those{_other_pythons()}"
        )
    if system == "Darwin" and machine != "arm64":
        raise SetupError("torch is no longer built for Intel Macs: use a Mac with an Apple chip, Linux or Windows")


def _other_pythons() -> str:
    names = (f"python{major}.{minor}" for major, minor in ((3, n) for n in range(NEWEST[1], OLDEST[1] - 1, -1)))
    found = next(filter(shutil.which, names), None)
    return f", for example {found}, which is installed" if found else ""


def parse_cards(text: str) -> list[Card]:
    """Reads `nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader`; other lines are skipped."""
    lines = (re.match(r"(\d+)[\d.]*, *(\d+)\.(\d+), *(.+)", line) for line in text.splitlines())
    return [Card(m[4].strip(), (int(m[2]), int(m[3])), int(m[1])) for m in lines if m]


def find_cards() -> list[Card]:
    """The NVIDIA cards that the driver reports; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
    try:
        return parse_cards(subprocess.run(query, capture_output=True, text=True, timeout=30).stdout)
    except (OSError, subprocess.SubprocessError):
        return []


def torch_build(system: str, cards: Sequence[Card]) -> str | None:
    """Which build of torch fits: "cpu", "cu126" or "cu130"; None on macOS, which has only one.

    CUDA 13 left out the cards before Turing (7.5) and needs driver 580; CUDA 12.6 serves older ones, but not
    Blackwell (10.0 and up), whose owners need a newer driver in any case.
    """
    if system == "Darwin":
        return None
    if not cards:
        return "cpu"
    best = max(cards, key=lambda card: card.capability)
    old_driver = best.driver is not None and best.driver < 580
    return "cu126" if best.capability < (7, 5) or (old_driver and best.capability < (10, 0)) else "cu130"


def install_command(version: str, build: str | None) -> str:
    """The command that replaces torch by another build of `version`."""
    if build is None:
        return f"python -m pip install --force-reinstall torch=={version}"
    return f"python -m pip install torch=={version}+{build} --index-url {WHEEL_INDEX}{build}"


def check_disk(free: int, folder: Path, build: str | None) -> None:
    """Raises SetupError when `free` bytes are too few for the packages of this build."""
    needed = DISK_GB["cuda" if (build or "").startswith("cu") else "cpu"]
    if free < needed * 10**9:
        raise SetupError(f"{folder} has {free / 10**9:.1f} GB free, but the packages need {needed} GB: make room there")


def explain(stderr: str) -> str:
    """One sentence for a failed pip, from what it wrote to stderr."""
    if re.search(r"No space left on device|Errno 28\b|not enough space on the disk", stderr):
        return "the disk is full: make room and run the same command again, it goes on where it stopped"
    if re.search(r"Retrying \(|ConnectionError|TimeoutError|ProxyError|SSLError|Failed to resolve", stderr):
        return (
            "the package index cannot be reached: check the network, HTTPS_PROXY and `pip config list`, "
            "and run the same command again, it goes on where it stopped"
        )
    missing = re.search(r"No matching distribution found for (\S+)", stderr)
    if missing:
        return f"the package index has no {missing[1]} for Python {platform.python_version()} on {platform.platform()}"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return re.sub(r"^error:\s*", "", (errors or lines or ["it gave no reason"])[-1], flags=re.IGNORECASE)


# --- The stamp: which requirements files the .venv was finished for ---


def fingerprint(requirements: Path) -> str:
    """A hash of a requirements file and of those it includes."""
    text = requirements.read_text(encoding="utf-8")
    for included in re.findall(r"^-r\s+(\S+)", text, flags=re.MULTILINE):
        text += fingerprint(requirements.parent / included)
    return hashlib.sha256(text.encode()).hexdigest()


class Stamp:
    """A file in the `.venv` with one line, `<fingerprint> <file>`, per requirements file installed to the end.

    It is taken away while pip works: after an interruption there is none, and the installation is resumed.
    """

    def __init__(self, venv: Path) -> None:
        self.path = venv / "atelier-setup.txt"

    def has(self, requirements: Path) -> bool:
        return self._line(requirements) in self._lines()

    def clear(self) -> list[str]:
        """Removes the stamp and returns its lines."""
        lines = self._lines()
        if lines:
            self.path.unlink()
        return lines

    def write(self, requirements: Path, before: Sequence[str]) -> None:
        """Adds `requirements` to the lines from before, of which those remain whose files have not changed since."""
        kept = [line for line in before if line == self._line(requirements.parent / line.partition(" ")[2])]
        lines = sorted({*kept, self._line(requirements)})
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    @staticmethod
    def _line(requirements: Path) -> str:
        return f"{fingerprint(requirements)} {requirements.name}" if requirements.exists() else ""

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []


# --- Doing it ---


def say(text: str) -> None:
    print(text, flush=True)


def progress(line: str) -> str | None:
    """What a line of pip's output is worth on the console: its longer downloads and the installation."""
    download = re.match(r"\s*Downloading (\w+)-(\S+?)-.*\(([\d.]+ [MG]B)\)", line)
    if download:
        return f"  downloading {download[1]} {download[2]} ({download[3]})"
    if line.startswith("Installing collected packages:"):
        return f"  unpacking {line.count(',') + 1} packages"
    return None


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, shows its progress and keeps its stderr for `explain`."""
    options = {"stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(command, stderr=stderr, **options) as process:
        for shown in filter(None, map(progress, process.stdout)):
            say(shown)
        status = process.wait()
        stderr.seek(0)
        return subprocess.CompletedProcess(command, status, stderr=stderr.read().decode(errors="replace"))


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(requirements: Path, venv: Path = VENV, run: Run = run_command) -> Path:
    """Brings `venv` to `requirements` and returns its Python; at once when that was finished before.

    Raises:
        SetupError: wrong Python, too little disk, no venv module, no network, or whatever else pip reports.
    """
    python, stamp = venv_python(venv), Stamp(venv)
    if python.exists() and stamp.has(requirements):
        return python
    check_python(sys.version_info[:2], 64 if sys.maxsize > 2**32 else 32, platform.system(), platform.machine())
    cards = find_cards()
    build = torch_build(platform.system(), cards)
    if not _usable(python, run):
        check_disk(shutil.disk_usage(venv.parent).free, venv.parent, build)
        _create(venv, run)
    elif run([str(python), "-c", "import pip"]).returncode != 0:
        _check(run([str(python), "-m", "ensurepip"]), f"pip could not be added to {venv}")
    before = stamp.clear()
    if build is not None:
        say(f"{cards[0].name if cards else 'No NVIDIA card'}: taking the {build} build of torch")
    if build is not None and build != PYPI_BUILD.get(platform.system()):
        _install_torch(python, requirements, build, run)
    say(f"Installing {requirements.name} into {venv} (the first time takes minutes)")
    _check(run([*_pip(python), "-r", str(requirements)]), f"{requirements.name} could not be installed")
    stamp.write(requirements, before)
    say("Set-up finished")
    return python


def _usable(python: Path, run: Run) -> bool:
    """Whether an environment's Python is there, starts (its base may be gone) and is of a version we support."""
    test = f"import sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    return python.exists() and run([str(python), "-c", test]).returncode == 0


def _create(venv: Path, run: Run) -> None:
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        package = "python{}.{}-venv".format(*sys.version_info)
        raise SetupError(f"this Python has no venv module: install it (Debian, Ubuntu: sudo apt install {package})")
    say(f"{'Making' if not venv.exists() else 'Making anew, since it was not usable:'} {venv}")
    _check(run([sys.executable, "-m", "venv", "--clear", str(venv)]), f"{venv} could not be made")


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]


def _install_torch(python: Path, requirements: Path, build: str, run: Run) -> None:
    """Installs torch alone, from its own index, so that everything else still comes from pip's usual place."""
    base = requirements.parent / "requirements.txt"
    pin = next(line for line in base.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    patience = ["--retries", "1", "--timeout", "15"]
    if run([*_pip(python), "--no-deps", *patience, "--index-url", WHEEL_INDEX + build, pin]).returncode != 0:
        say(f"{WHEEL_INDEX}{build} does not give {pin}: taking torch from pip's usual index, whose build may not fit")


def _check(done: subprocess.CompletedProcess[str], failure: str) -> None:
    if done.returncode != 0:
        raise SetupError(f"{failure}: {explain(done.stderr)}")


def hand_over(command: Sequence[str], cwd: Path | None = None) -> int:
    """Runs `command` to its end and returns its exit status; on Ctrl-C, which reaches it too, it alone decides."""
    process = subprocess.Popen(command, cwd=cwd)
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue
        return status if status >= 0 else 128 - status  # a signal, as shells report it


def enter(requirements: str, command: Sequence[str], cwd: Path | None = None) -> int:
    """Sets the environment up for the named requirements file, runs its Python with `command`, returns the status."""
    try:
        python = prepare(ROOT / requirements)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return hand_over([str(python), *command], cwd)
