"""What an unfinished run is done with."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from library.errors import UserError
from library.preprocessing.journal import Journal

PURPOSE = {"threshold": 0.35, "words": ["a", "b"]}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal"


def abandoned(path: Path, *names: str, **purpose: object) -> None:
    """A run that was broken off when it was done with these."""
    journal = Journal(path, PURPOSE | purpose)
    for number, name in enumerate(names):
        journal.note(name, {"number": number})
    journal._file.close()


def test_the_next_run_goes_on_from_there(path):
    abandoned(path, "a.png", "ä b.png", os.fsdecode(b"\xff.png"))
    journal = Journal(path, PURPOSE)
    assert journal.done == {"a.png": {"number": 0}, "ä b.png": {"number": 1}, os.fsdecode(b"\xff.png"): {"number": 2}}
    journal.note("c.png")
    journal._file.close()
    journal = Journal(path, dict(reversed(PURPOSE.items())))
    assert list(journal.done)[-1] == "c.png"
    journal.finish()
    assert not path.exists()
    assert Journal(path, PURPOSE).done == {}


def test_what_was_noted_is_there_at_once(path):
    journal = Journal(path, PURPOSE)
    journal.note("a.png", [1, None, "x\ny"])
    assert Journal(path, PURPOSE).done == {"a.png": [1, None, "x\ny"]}


def test_what_was_noted_for_another_purpose_is_dropped(path):
    abandoned(path, "a.png")
    assert Journal(path, PURPOSE | {"threshold": 0.5}).done == {}
    assert Journal(path, PURPOSE).done == {}


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_cut_off_does_not_count(path, cut):
    abandoned(path, "a.png", "a name of some length.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    journal = Journal(path, PURPOSE)
    assert list(journal.done) == ["a.png"]
    journal.note("c.png")
    journal._file.close()
    assert list(Journal(path, PURPOSE).done) == ["a.png", "c.png"]


@pytest.mark.parametrize("rubbish", [b"\0" * 50, b"\xff\xfe\n", b"[1]\n", b"3\n", b"{}\n", b'["a", 1, 2]\n'])
def test_what_a_crash_of_the_machine_leaves_does_not_count(path, rubbish):
    abandoned(path, "a.png")
    with path.open("ab") as file:
        file.write(rubbish + b'["b.png", null]\n')
    assert list(Journal(path, PURPOSE).done) == ["a.png"]
    path.write_bytes(rubbish)
    assert Journal(path, PURPOSE).done == {}


def test_what_only_it_has_is_not_dropped_for_another_purpose(path):
    abandoned(path, "a.png", "b.png")
    there = path.read_bytes()
    for purpose, said in (({"threshold": 0.5}, "a run with threshold 0.35 did, for 2 pictures"), ({"new": 1}, "other")):
        with pytest.raises(UserError, match=said):
            Journal(path, PURPOSE | purpose, only_copy=True)
    assert path.read_bytes() == there
    assert len(Journal(path, PURPOSE, only_copy=True).done) == 2
    path.unlink()
    abandoned(path)
    assert Journal(path, PURPOSE | {"threshold": 0.5}, only_copy=True).done == {}


def test_it_is_removed_only_if_nothing_is_noted(path):
    with Journal(path, PURPOSE):
        pass
    assert not path.exists()
    with Journal(path, PURPOSE) as journal:
        journal.note("a.png")
    assert list(Journal(path, PURPOSE).done) == ["a.png"]


BUSY = f"""
import sys
sys.path.insert(0, {os.fspath(Path(__file__).parent.parent)!r})
from pathlib import Path
from library.preprocessing.journal import Journal
journal = Journal(Path(sys.argv[1]), {PURPOSE!r})
for number in range(10**9):
    journal.note(str(number))
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no locks of this kind")
def test_a_second_run_at_once_is_refused(path):
    command = [sys.executable, "-c", BUSY, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        for purpose in (PURPOSE, {}):
            with pytest.raises(UserError, match="another run is at work on this"):
                Journal(path, purpose)
        process.kill()
    assert "0" in Journal(path, PURPOSE).done


def test_notes_of_threads_are_whole(path):
    journal = Journal(path, PURPOSE)

    def work(number: int) -> None:
        for item in range(200):
            journal.note(f"{number} {item}", "x" * 100)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(path, PURPOSE).done) == 800


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="journal cannot be written: "):
        Journal(tmp_path / "file" / "journal", PURPOSE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_a_full_disk_is_one_sentence(path):
    journal = Journal(path, PURPOSE)
    journal._file.close()
    full = pytest.raises(UserError, match="journal cannot be written: No space left")
    journal._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the journal closes it
    with full:
        journal.note("a.png")
    journal.close()


def test_a_run_that_is_killed_loses_nothing_noted(path):
    command = [sys.executable, "-c", BUSY, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(50):
            process.stdout.readline()
        process.kill()
        rest = process.stdout.read().split("\n")
    said = 50 + len([line for line in rest[:-1] if line])
    assert said <= len(Journal(path, PURPOSE).done) <= said + 1


def test_a_hundred_thousand_are_read_quickly(path):
    with path.open("w") as file:
        file.write("{}\n" + "".join(f'["picture {number}.png", null]\n' for number in range(100_000)))
    start = time.monotonic()
    assert len(Journal(path, {}).done) == 100_000
    assert time.monotonic() - start < 5
