"""What the console shows, and what it does not."""

import logging
import warnings

import pytest

from library import console
from library.errors import UserError
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
