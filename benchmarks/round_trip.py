"""What becomes of a model file of the published size that is read and written again: nothing may be lost.

    python benchmarks/round_trip.py --family sd1|sd2|sdxl [--work_dir DIR]

A random file (see `random_model.py`) is loaded and saved as a single file; saved as a Diffusers folder, loaded and
saved as a single file; and that once more without the folder's side file, as if somebody else had written it, which
lists what differs then. Each result is compared with the first file tensor by tensor, by the safetensors library:
names, number formats, shapes and bytes. `DIR` (default: a temporary folder) needs room for three times the file.

Exit status 1 if anything differs on the first two ways.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import console

with console.quiet_dependencies():
    import torch
    from safetensors import safe_open

    from benchmarks.random_model import family_named, write_random_model
    from library.models.diffusers_writer import write_folder
    from library.models.registry import load_model

from tests.full_size import CONFIGS

SIDE_FILE = "original_layout.safetensors"


class Differences(NamedTuple):
    """How a file differs from another: counts of tensors, and names."""

    same: int
    changed: list[str]
    missing: list[str]
    added: list[str]

    @property
    def none(self) -> bool:
        return not (self.changed or self.missing or self.added)

    def __str__(self) -> str:
        kinds = {"changed": self.changed, "missing": self.missing, "added": self.added}
        return ", ".join([f"{self.same} tensors identical", *(f"{len(v)} {k}" for k, v in kinds.items() if v)])


def compare(first: Path, second: Path) -> Differences:
    """Both are mapped into memory, and never held."""
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        names, others = set(one.keys()), set(other.keys())
        common = sorted(names & others)
        changed = [name for name in common if not _identical(one.get_tensor(name), other.get_tensor(name))]
    return Differences(len(common) - len(changed), changed, sorted(names - others), sorted(others - names))


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def through_memory(source: Path, target: Path) -> None:
    load_model(source, torch.float16).save(target)


def to_folder(source: Path, folder: Path) -> None:
    write_folder(load_model(source, torch.float16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of a full-size model that is read and written again.")
    parser.add_argument("--family", choices=tuple(CONFIGS), required=True)
    parser.add_argument("--work_dir", type=Path, help="where the files go (default: a temporary folder)")
    arguments = parser.parse_args()
    console.setup(None)
    if arguments.work_dir:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as place:
        lost = round_trips(arguments.family, Path(place))
    sys.exit(1 if lost else 0)


def round_trips(name: str, place: Path) -> bool:
    """Whether something is lost where nothing need be."""
    first, again, folder = place / "first.safetensors", place / "again.safetensors", place / "folder"
    write_random_model(family_named(name), first)
    print(f"{name}: {first.stat().st_size / 1e9:.2f} GB")
    single = trip("file -> memory -> file", first, again)
    start = time.perf_counter()
    to_folder(first, folder)
    print(f"file -> memory -> folder: {time.perf_counter() - start:.0f} s, {_size(folder) / 1e9:.2f} GB")
    whole = trip("folder -> memory -> file", first, again, source=folder)
    (folder / SIDE_FILE).unlink(missing_ok=True)
    foreign = trip("folder without side file -> memory -> file", first, again, source=folder)
    for kind, names in {"changed": foreign.changed, "missing": foreign.missing, "added": foreign.added}.items():
        if names:
            print(f"  {kind}: {', '.join(names)}")
    return not (single.none and whole.none)


def trip(title: str, first: Path, again: Path, source: Path | None = None) -> Differences:
    """`source` (default: the first file) through memory to a file, compared with the first and deleted."""
    start = time.perf_counter()
    through_memory(source or first, again)
    seconds = time.perf_counter() - start
    differences = compare(first, again)
    again.unlink()
    print(f"{title}: {differences}, {seconds:.0f} s")
    return differences


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
