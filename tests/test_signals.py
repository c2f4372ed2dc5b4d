"""Runs that are asked to end, or for something else, while they go on."""

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.training.events import Obey
from library.training.requests import Requests
from library.training.resuming import states
from library.training.resuming.state import Progress
from tests.lives import Life, assert_tidy, assert_whole, stored

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")

UNSAVED = {"save_every_n_steps": None, "save_state": None, "save_last_n_steps": None, "save_last_n_steps_state": None}
"""Nothing is saved but at the end, and where it is asked for."""
ANSWER = "the run will be saved after this step"
SLOW = 0.3  # seconds per step: enough to hear of one before the next ends


@pytest.fixture(scope="module")
def whole(fork_server, flags, tmp_path_factory) -> Life:
    """The run that nobody asks for anything."""
    life = Life(tmp_path_factory.mktemp("whole"), fork_server, flags)
    assert life.go_on().status == 0
    return life


def after(step: int) -> str:
    """What the progress bar shows then."""
    return f" {step}/8 ["


def state(life: Life, step: int) -> states.StateFolder:
    return states.read(life.output / f"run-step{step:08d}{states.SUFFIX}")


def assert_ends_alike(life: Life, whole: Life) -> None:
    """The same weights and curves; some files are left that were asked for."""
    ended = life.go_on()
    assert ended.status == 0, ended.said
    assert stored(life.output / "run.safetensors") == stored(whole.output / "run.safetensors")
    assert life.curves() == whole.curves()
    assert_tidy(life)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_signals_save_and_end_a_run_which_then_goes_on(life, whole, workers):
    run = life("asked", **UNSAVED, max_data_loader_n_workers=workers, persistent_data_loader_workers=True)
    for step, (number, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], 1):
        ended = run.go_on(slow=SLOW, when=[(after(2 * step), number)])
        assert ended.status == status, ended.said
        at = int(re.search(rf"ended by {number.name} after step (\d) of 8: --resume latest goes on", ended.said)[1])
        assert at >= 2 * step
        assert "Traceback" not in ended.said
        assert ended.said.count(ANSWER) == 1
        assert state(run, at).step == at
        assert (run.output / f"run-step{at:08d}.safetensors").is_file()
        assert_whole(run)
    assert_ends_alike(run, whole)


def test_a_second_signal_ends_it_at_once_and_the_state_before_is_there(life, whole):
    run = life("asked")
    ended = run.go_on(slow=2, when=[(after(3), signal.SIGTERM), (ANSWER, signal.SIGTERM)])
    assert ended.status == -signal.SIGTERM, ended.said
    assert [state(run, 2) is not None, state(run, 4)] == [True, None]
    assert_ends_alike(run, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_they_end_it_without_a_trace(life, number, status):
    run = life("asked")
    ended = run.go_on(when=[("so this is a new run", number)])
    assert ended.status == status
    assert "Traceback" not in ended.said
    assert not list(run.output.iterdir())
    assert not list(run.temporary.iterdir())


def test_words_in_the_control_file_are_obeyed(life, whole, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    run = life("asked", **UNSAVED, sample_prompts=prompts)
    control = run.output / "run.control"
    run.output.mkdir()
    control.write_text("stop")
    orders = [(after(1), "save"), (after(3), "sampel"), ("'sampel' is none of", "sample"), (after(6), "stop")]
    ended = run.go_on(slow=SLOW, when=[(text, ("write", str(control), word)) for text, word in orders])
    assert ended.status == 0, ended.said
    assert "run.control is from before this run and is removed" in ended.said
    assert "'sampel' is none of save, sample, stop, did you mean" in ended.said
    assert re.search("ended as the control file asks after step [67] of 8", ended.said)
    assert len(list(run.output.glob(f"*{states.SUFFIX}"))) == 2
    assert len(list((run.output / "sample").iterdir())) == 1
    assert not control.exists()
    assert_ends_alike(run, whole)


ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


def test_words_that_come_while_others_are_read_are_not_lost(tmp_path, monkeypatch):
    control, read = tmp_path / "run.control", Path.read_bytes
    requests = Requests(control, ALONE)
    control.write_text("save")
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read(path), control.write_text("sample"))[0])
    assert requests.heard() == {"save"}
    monkeypatch.undo()
    requests.looked = 0
    assert requests.heard() == {"sample"}
    assert not list(tmp_path.iterdir())


def test_a_request_to_paint_without_prompts_is_answered(capsys, fresh_console):
    requests = SimpleNamespace(heard=lambda: {"sample"}, control_file="run.control")
    Obey(requests, None, SimpleNamespace(requests=[]))(Progress(2, 1, step=1))
    assert "run.control: there is nothing to paint, give --sample_prompts a file" in capsys.readouterr().err


def test_no_save_is_promised_after_the_last_step(tmp_path, capfd):
    requests = Requests(tmp_path / "run.control", ALONE)
    requests.no_more_steps()
    with requests.listening():
        signal.raise_signal(signal.SIGTERM)
    assert "the run ends as soon as its last files are written" in capfd.readouterr().err
