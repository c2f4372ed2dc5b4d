"""What becomes of pictures: in what order, which are left out and why, and what is told of it."""

import errno
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from library.data.decode import BrokenImage, decode
from library.errors import UserError
from library.preprocessing.tally import Tally, batched, prepared, shown
from tests.pictures import picture

pytestmark = pytest.mark.usefixtures("fresh_console")
PICTURES = [Path(f"{number}.png") for number in range(8)]


def numbers(prepare, tally: Tally, *, threads: int = 3) -> list[tuple[str, object]]:
    return [(path.stem, result) for path, result in prepared(PICTURES, prepare, tally, threads=threads, doing="x")]


@pytest.mark.parametrize("threads", [1, 2, 7, 20])
def test_order_does_not_depend_on_threads(threads):
    def slow(path: Path) -> int:
        time.sleep(0.01 if path.stem in "036" else 0)
        return int(path.stem) ** 2

    assert numbers(slow, Tally(), threads=threads) == [(str(number), number**2) for number in range(8)]


def test_broken_pictures_are_left_out_and_counted(tmp_path, capsys):
    paths = [picture(tmp_path / f"{name}.png") for name in "abcde"]
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[3].unlink()
    tally = Tally()
    read = prepared(paths, lambda path: decode(path, keep_alpha=False, legacy=False), tally, threads=2, doing="reading")
    tally.written = len([path for path, _ in read])
    assert (tally.written, tally.failed) == (2, paths[1:4])
    tally.tell("captions", "CPU")
    said = capsys.readouterr()
    assert said.out == f"captions: 2 written, 0 skipped, 3 failed ({', '.join(map(str, paths[1:4]))}), on CPU\n"
    assert f"{paths[1]}: the file is empty: it is left out" in said.err
    assert f"{paths[3]}: it is no longer there: it is left out" in said.err
    assert "5/5" in said.err


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_a_picture_that_failed(code):
    def prepare(path: Path) -> str:
        if path.stem == "3":
            raise OSError(code, os.strerror(code), str(path))
        return path.stem

    tally = Tally()
    assert [stem for stem, _ in numbers(prepare, tally)] == ["0", "1", "2", "4", "5", "6", "7"]
    assert tally.failed == [PICTURES[3]]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x.png"), "out/x.png: No space left on device"),
        (MemoryError(), "3.png: there is not enough memory for it: give a smaller --max_data_loader_n_workers"),
        (UserError("x cannot be written"), "x cannot be written"),
    ],
)
def test_what_is_no_fault_of_a_picture_ends_the_work(error, sentence):
    seen = []

    def prepare(path: Path) -> None:
        if path.stem == "3":
            raise error

    work = prepared(PICTURES, prepare, Tally(), threads=2, doing="x")
    with pytest.raises(UserError, match=sentence):
        seen.extend(path.stem for path, _ in work)
    assert seen == ["0", "1", "2"]


def test_mistakes_of_ours_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        numbers(lambda path: 1 // int(path.stem), Tally())


@pytest.mark.parametrize("in_batches", [False, True])
def test_whoever_is_interrupted_stops_the_work(in_batches):
    begun = []

    def slow(path: Path) -> None:
        begun.append(path)
        time.sleep(0.02)

    def work(pictures: list[Path]) -> Iterator[tuple[Path, None]]:
        return prepared(pictures, slow, Tally(), threads=2, doing="x")

    def break_off() -> None:
        many = [Path(f"{number}.png") for number in range(1000)]
        for _ in batched(work(many), 3) if in_batches else work(many):
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        break_off()
    count = len(begun)
    assert count < 20
    time.sleep(0.1)
    assert len(begun) == count
    assert threading.active_count() == before


@pytest.mark.parametrize(("ahead", "begun"), [(0, 5), (8, 13)])
def test_as_many_more_are_read_ahead_as_are_wanted_at_once(ahead, begun):
    pictures, seen = [Path(f"{number}.png") for number in range(50)], []
    results = prepared(pictures, seen.append, Tally(), threads=2, doing="x", ahead=ahead)
    next(results)
    time.sleep(0.05)
    assert len(seen) == begun
    results.close()


def test_the_bar_counts_what_is_finished(capsys):
    for _ in prepared(PICTURES[:2], lambda path: path, Tally(), threads=1, doing="reading"):
        time.sleep(0.15)
        sys.stderr.flush()
        assert "2/2" not in capsys.readouterr().err.rpartition("\r")[2]
    assert "2/2" in capsys.readouterr().err


def test_batches():
    assert list(batched(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []


def test_the_end_is_told_in_one_line(capsys):
    with Tally(written=3, skipped=2) as tally:
        tally.tell("tag files")
    assert capsys.readouterr().out == "tag files: 3 written, 2 skipped, 0 failed\n"


def test_of_many_failures_the_first_are_named(capsys):
    tally = Tally(written=1)
    for number in range(30):
        tally.fail(Path(f"{number}.png"), "it is broken")
    tally.tell("tag files", "CPU")
    (line,) = capsys.readouterr().out.splitlines()
    assert "30 failed (0.png, 1.png, " in line
    assert line.endswith("19.png and 10 more), on CPU")


@pytest.mark.parametrize("counts", [{}, {"failed": [Path("a.png")]}])
def test_writing_nothing_is_an_error(counts, capsys):
    with pytest.raises(UserError, match="no tag files are written"), Tally(**counts) as tally:
        tally.tell("tag files")
    assert capsys.readouterr().out.count("\n") == 1


def test_all_there_already_is_none(capsys):
    Tally(skipped=1).tell("tag files")
    assert "0 written, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, SystemExit])
def test_what_is_broken_off_tells_how_far_it_came(error, capsys):
    def break_off() -> None:
        with Tally(skipped=2) as tally:
            for _ in prepared(PICTURES, lambda path: path, tally, threads=1, doing="x"):
                tally.written += 1
                if tally.written == 3:
                    raise error

    with pytest.raises(error):
        break_off()
    assert capsys.readouterr().out == "so far: 3 written, 2 skipped, 0 failed\n"


def test_what_is_broken_off_before_anything_was_done_tells_nothing(capsys):
    with pytest.raises(KeyboardInterrupt), Tally():
        raise KeyboardInterrupt
    assert not capsys.readouterr().out


def test_names_that_the_console_cannot_show_are_told_all_the_same(monkeypatch):
    for encoding, name, expected in (
        ("utf-8", os.fsdecode(b"\xff.png"), rb"\udcff.png"),
        ("cp1252", "ガ.png", rb"\u30ac.png"),
        ("utf-8", "ガ.png", "ガ.png".encode()),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        Tally(written=1, failed=[Path(name)]).tell("tag files")
        print(shown(name), flush=True)
        assert stream.buffer.getvalue().count(expected) == 2


def test_reasons_are_those_of_the_pictures():
    def prepare(path: Path) -> None:
        raise BrokenImage(f"reason {path.stem}")

    tally = Tally()
    assert not numbers(prepare, tally)
    assert tally.failed == PICTURES
