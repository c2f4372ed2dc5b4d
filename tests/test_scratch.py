"""Temporary folders: nothing of them stays, however their makers end, and nobody deletes another one's."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

from library.data import scratch
from library.data.records import scan
from library.data.scratch import ScratchFolder
from library.errors import UserError
from tests.pictures import dataset, picture, subset
from tests.processes import ROOT


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Where the folders are made."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def folder_of(number: int, place: Path, machine: str = scratch._MACHINE) -> Path:
    folder = place / f"atelier_{number}_{machine}_latents_abc"
    folder.mkdir()
    (folder / "latents.bin").touch()
    return folder


def test_a_folder_goes_with_its_object(place):
    scratch_folder = ScratchFolder("latents")
    assert list(place.iterdir()) == [scratch_folder.path]
    del scratch_folder
    assert not list(place.iterdir())


def test_the_maps_go_before_the_folder(tmp_path, place, monkeypatch):
    """Windows does not delete files that are mapped."""
    picture(tmp_path / "a" / "a.png", caption="x")
    table = scan([dataset(subset(tmp_path / "a"))])
    mapped = [value for value in vars(table).values() if isinstance(value, np.memmap)]
    assert len(mapped) > 3
    del mapped
    if sys.platform == "linux":
        maps = []
        monkeypatch.setattr(scratch.shutil, "rmtree", lambda *_, **__: maps.append(Path("/proc/self/maps").read_text()))
        del table
        assert str(place) not in maps[0]


def test_what_the_dead_left_is_removed_and_nothing_else(place):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [folder_of(dead.pid, place), folder_of(os.getpid(), place)]  # a container starts with the same numbers again
    reused = folder_of(os.getppid(), place)  # whose parent started long after this was written
    os.utime(reused, (0, 0))
    kept = [folder_of(dead.pid, place, "another-machine"), folder_of(1, place), place / "atelier_notes"]
    kept[-1].mkdir(exist_ok=True)
    kept += [ScratchFolder("records").path]
    own = ScratchFolder("latents")
    assert not any(folder.exists() for folder in [*left, reused])
    assert all(folder.exists() for folder in [*kept[:-1], own.path])


@pytest.mark.parametrize(
    ("end", "status", "left"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0), (signal.SIGKILL, -9, 1)]
)
def test_an_end_by_a_signal(place, end, status, left):
    code = """
    import time
    from library.cli import run
    from library.data.scratch import ScratchFolder
    def main():
        folder = ScratchFolder("records")
        print("ready", flush=True)
        time.sleep(60)
    run(main)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(place)},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(end)
    assert process.returncode == status
    assert len(list(place.iterdir())) == left
    folder = ScratchFolder("records")
    assert list(place.iterdir()) == [folder.path]


def test_a_full_disk_is_one_sentence_with_its_remedy(tmp_path, place, monkeypatch):
    picture(tmp_path / "a" / "a.png", caption="x")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=f"{place} is full: free some space, or set the environment variable TMPDIR"):
        scan([dataset(subset(tmp_path / "a"))])
