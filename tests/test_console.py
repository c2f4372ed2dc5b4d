"""What the console shows, and what it does not."""

import logging
import warnings

import pytest

from library import bars, console
from library.errors import UserError
from library.options import ConsoleOptions
from tests.processes import python

pytestmark = pytest.mark.usefixtures("fresh_console")


def test_messages_are_said_once_and_by_the_first_process_only(capsys, monkeypatch, tmp_path):
    console.setup(tmp_path / "logs" / "run.log")
    for _ in range(2):
        console.notice("one %s thing")
        console.warn("one %s thing")
    monkeypatch.setenv("LOCAL_RANK", "1")
    console.notice("not said")
    monkeypatch.setenv("RANK", "0")
    console.notice("said")
    assert capsys.readouterr().err == "one %s thing\nwarning: one %s thing\nsaid\n"
    logged = (tmp_path / "logs" / "run.log").read_text(encoding="utf-8")
    assert [line.partition(": ")[2] for line in logged.splitlines()] == [
        "one %s thing",
        "warning: one %s thing",
        "said",
    ]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this log file cannot be written"):
        console.setup(tmp_path / "file" / "run.log")


def test_what_dependencies_warn_of_goes_to_the_log_file(capsys, tmp_path):
    console.setup(tmp_path / "run.log")
    logging.getLogger("a_package").warning("of a logger")
    with warnings.catch_warnings():
        logging.captureWarnings(False)
        console.setup(tmp_path / "run.log")
        warnings.simplefilter("always")
        warnings.warn("of Python", stacklevel=1)
        logging.captureWarnings(False)
    logged = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "of a logger" in logged
    assert "of Python" in logged
    assert capsys.readouterr() == ("", "")


NOISY = """
import logging, os, pathlib, sys, warnings
from library import console
console.setup({setup})
with console.quiet_dependencies({argument}):
    print("from Python")
    with console.quiet_dependencies():
        os.write(1, b"from C, stdout\\n")
        os.write(2, b"from C, stderr\\n")
    warnings.warn("a warning")
    logger = logging.getLogger("noisy.package")
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    logging.getLogger("other").warning("a log message")
print("out")
console.notice("err")
logger.warning("said later")
"""


def test_dependencies_are_quiet(tmp_path):
    result = python(NOISY.format(setup="None", argument=""))
    assert (result.returncode, result.stdout, result.stderr) == (0, "out\n", "err\n")

    path = tmp_path / "of_setup.log"
    result = python(NOISY.format(setup=f"pathlib.Path({str(path)!r})", argument=""))
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    logged = path.read_text(encoding="utf-8")
    for text in ("from Python", "stdout", "stderr", "a warning", "a log message", "err", "said later"):
        assert text in logged

    path = tmp_path / "of_its_own.log"
    result = python(NOISY.format(setup="None", argument=f"pathlib.Path({str(path)!r})"))
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    assert "from Python" in path.read_text(encoding="utf-8")


def test_quiet_survives_errors_and_closed_descriptors():
    result = python(
        """
        import os
        from library import console
        os.close(1)
        try:
            with console.quiet_dependencies():
                os.write(2, b"hidden")
                raise ImportError("broken package")
        except ImportError as problem:
            os.write(2, str(problem).encode())
        try:
            os.fstat(1)
        except OSError:
            os.write(2, b", 1 is still closed")
        os._exit(0)
        """
    )
    assert result.stderr == "broken package, 1 is still closed"


def test_a_progress_bar_stays_whole():
    result = python(
        """
        import sys
        from tqdm import tqdm
        from library import console
        with tqdm(total=2, file=sys.stderr, mininterval=0, miniters=1) as bar:
            bar.update()
            console.notice("a message")
            bar.update()
        """
    )
    assert "a message\n" in result.stderr.replace("\r", "\n")
    line = next(line for line in result.stderr.split("\n") if "a message" in line)
    assert line.rsplit("\r", 1)[-1] == "a message"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (None, "notice,warning: warning,error: error"),
        ("INFO", "notice,warning: warning,error: error"),
        ("WARNING", "warning: warning,error: error"),
        ("ERROR", "error: error"),
        ("CRITICAL", "error: error"),
        ("DEBUG", "notice,warning: warning,error: error,of a package"),
    ],
)
def test_the_level_chooses_what_is_shown_and_the_file_has_it_all(tmp_path, capsys, level, shown):
    console.notice("before")
    assert capsys.readouterr().err == "before\n"
    console.configure(ConsoleOptions(console_log_level=level, console_log_file=str(tmp_path / "new" / "console.log")))
    console.notice("notice")
    console.warn("warning")
    console.error("error")
    logging.getLogger("a_package").warning("of a package")
    assert capsys.readouterr().err.splitlines() == shown.split(",")
    console.setup(tmp_path / "messages.log")  # as soon as the run has a log folder
    console.notice("later")
    texts = ["before", "notice", "warning: warning", "error: error", "of a package", "later"]
    for file in ("new/console.log", "messages.log"):
        lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
        assert [line.partition(": ")[2] for line in lines] == texts


def test_the_chosen_file_is_appended_to_and_has_what_dependencies_print(tmp_path):
    chosen, of_run = tmp_path / "console.log", tmp_path / "messages.log"
    for text in ("first", "second"):
        python(
            f"""
            import pathlib
            from library import console
            from library.options import ConsoleOptions
            console.setup(None)
            console.configure(ConsoleOptions(console_log_file={str(chosen)!r}))
            with console.quiet_dependencies():
                print("{text}, early")
            console.setup(pathlib.Path({str(of_run)!r}))
            with console.quiet_dependencies():
                print("{text}, printed")
            """
        )
    printed = ["first, early", "first, printed", "second, early", "second, printed"]
    assert chosen.read_text(encoding="utf-8").splitlines() == printed
    assert of_run.read_text(encoding="utf-8").splitlines() == [printed[1], printed[3]]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this log file cannot be written"):
        console.configure(ConsoleOptions(console_log_file=str(tmp_path / "file" / "console.log")))


def test_simple_progress_is_told_in_lines(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    console.configure(ConsoleOptions(console_log_simple=True))
    with bars.progress_bar(total=100, initial=40, desc="training", unit="step") as bar:
        for _ in range(50):
            now += 1
            bar.set_postfix_str("loss 0.1")
            bar.update()
            if bar.n == 70:
                console.notice("a message")
    assert list(bars.progress_bar([1, 2], desc="short", delay=1)) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 50% 50/100 [00:10<00:50,  1.00step/s, loss 0.1]"
    assert [line.partition("[")[0] for line in lines[1:]] == [
        "training: 60% 60/100 ",
        "training: 70% 70/100 ",
        "a message",
        "training: 80% 80/100 ",
        "training: 90% 90/100 ",
    ]


def test_a_bar_that_moves_is_the_default(capsys):
    with bars.progress_bar(total=2, mininterval=0, miniters=1) as bar:
        bar.update()
    assert "\r" in capsys.readouterr().err
