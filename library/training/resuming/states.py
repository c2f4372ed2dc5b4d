"""Training states on the disk: a folder per state, `<name of the saved file>-state`. Imports no torch.

state.json            what, when and how far; written last, so that a folder without it is no state
trained.safetensors   what is trained, as it is in memory
objects.json          the optimizer, the curve of its rate, moving averages ...: numbers and texts
objects.safetensors   their tensors
engine/               weights and optimizer instead, where FSDP or DeepSpeed spreads them
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.console import notice, warn
from library.errors import UserError, some, suggest_path
from library.replacing import clean_up, put_back, replacing, working_names

MANIFEST, OBJECTS, TENSORS, TRAINED = "state.json", "objects.json", "objects.safetensors", "trained.safetensors"
ENGINE = "engine"
SUFFIX = "-state"
SAMPLES = "sample"  # where previews go
LATEST = "latest"
VERSION = 1
_CHECKSUM = "checksum"
_FORMAT = "atelier training state"
# What accelerate writes by itself.
_FOREIGN = ("optimizer.bin", "optimizer.pt")
_NUMBERS = r"(-\d{6}|-step\d{8}|-best)?"


@dataclass(frozen=True)
class StateFolder:
    """A state, from its manifest alone."""

    folder: Path
    written_at: float
    """Seconds since 1970."""
    progress: Mapping[str, Any]
    """The fields of `Progress`."""
    facts: Mapping[str, Any]
    """What the run was made of."""
    ours: bool = True
    """False: it was written by accelerate, and has weights and an optimizer at most."""

    @property
    def step(self) -> int:
        return self.progress.get("step", 0)


def file_names(output_name: str) -> str:
    """A pattern of all names that a run saves under, but for those of its saved files without --output_name."""
    stems = [re.escape(output_name), *(["epoch", "at"] if output_name == "last" else [])]
    return rf"({'|'.join(stems)}){_NUMBERS}(-ema)?({SUFFIX})?(\.\w+)?"


def control_file(output_dir: Path, output_name: str) -> Path:
    """Where words for a run of this name are left."""
    return output_dir / f"{output_name}.control"


def tidy(output_dir: Path, output_name: str) -> None:
    """Remove what killed runs of this name left half-written, and finish what they left half-replaced."""
    clean_up(output_dir, file_names(output_name))
    if (samples := output_dir / SAMPLES).is_dir():
        clean_up(samples, rf"{re.escape(output_name)}_.*\.png")


def find(wanted: str, output_dir: Path, output_name: str, *, only_looks: bool = False) -> StateFolder | None:
    """The state that --resume means. None for `latest` where there is none yet.

    UserError if the folder is missing or holds no state, or states of several runs of which none has this name. With
    `only_looks` a folder whose replacement was interrupted stays under the name that it had then.
    """
    folder = output_dir if wanted == LATEST else Path(wanted)
    if not only_looks:
        put_back(folder)
    elif not folder.exists() and working_names(folder)[1].exists():
        folder = working_names(folder)[1]
    if not folder.is_dir():
        raise UserError(f"--resume: {folder} is no folder{suggest_path(folder, folder=True)}")
    state = read(folder)
    if state is not None:
        return state
    states = _states_in(folder)
    own = [state for state in states if state.facts.get("output_name") == output_name]
    names = sorted({str(state.facts.get("output_name")) for state in states})
    if not own and wanted == LATEST:
        notice(f"--resume latest: there is no state of {output_name} in {folder} yet, so this is a new run")
        return None
    if not own and len(names) > 1:
        raise UserError(f"--resume: {folder} holds states of {', '.join(names)}: name one of them as --output_name")
    if not states:
        raise UserError(f"--resume: {folder} holds no training state: give a folder whose name ends in {SUFFIX}")
    return max(own or states, key=lambda state: (state.written_at, state.step))


def note_others(output_dir: Path, output_name: str) -> None:
    """Say that there are states of a run of this name, for a new one, which does not go on with any."""
    if not output_dir.is_dir():
        return
    own = re.compile(file_names(output_name))
    found = sorted(path.parent.name for path in output_dir.glob(f"*{SUFFIX}/{MANIFEST}"))
    found = [name for name in found if own.fullmatch(name)]
    if found:
        notice(
            f"{output_dir} holds states of another run named {output_name} ({some(found)}), and this is a new run: "
            "--resume latest goes on with the newest of all of them, so choose another --output_name to keep them apart"
        )


def _states_in(folder: Path) -> list[StateFolder]:
    """Our states in a folder. Those that are damaged are left out, unless there is no other."""
    states, problems = [], []
    for entry in sorted(folder.iterdir()):
        try:
            state = read(entry) if entry.is_dir() else None
        except UserError as problem:
            problems.append(problem)
            continue
        if state is not None and state.ours:
            states.append(state)
    if problems and not states:
        raise problems[-1]
    for problem in problems:
        warn(f"{problem}; it is left out here")
    return states


def read(folder: Path) -> StateFolder | None:
    """The manifest in a folder, or None if it is no state. UserError for one that is damaged, or newer than this
    program.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        foreign = any((folder / name).is_file() for name in _FOREIGN)
        return StateFolder(folder, folder.stat().st_mtime, _foreign_progress(folder), {}, False) if foreign else None
    try:
        content = json.loads(manifest.read_bytes())
        if content["format"] != _FORMAT:
            return None
        if int(content["version"]) > VERSION:
            raise UserError(
                f"{folder} was written by a newer version of this program: update this one to resume from it"
            )
        content = unsealed(content)
        sizes = {str(name): int(size) for name, size in content["files"].items()}
        state = StateFolder(folder, float(content["written_at"]), content["progress"], content["facts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} is damaged: resume from another state") from error
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{folder} is incomplete: its {name} is missing or cut short, copy it again")
    return state


def write_manifest(folder: Path, progress: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Declare everything in a folder to be a state."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    content = {
        "format": _FORMAT,
        "version": VERSION,
        "written_at": time.time(),
        "progress": progress,
        "facts": facts,
        "files": files,
    }
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(sealed(content), indent=1, ensure_ascii=False).encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be written as JSON, with a checksum in it."""
    return {**content, _CHECKSUM: _checksum(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed, as JSON has it. ValueError if it is not as it was."""
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    if content[_CHECKSUM] != _checksum(rest):
        raise ValueError("the checksum does not fit")
    return rest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _foreign_progress(folder: Path) -> dict[str, int]:
    """How far a run had come whose state accelerate wrote, where its folder says so."""
    try:
        told = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        return {"step": int(told["current_step"]), "epoch": int(told["current_epoch"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
