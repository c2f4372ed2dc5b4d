"""Runs whose disk is full: what they had stays, and they go on as well as they can."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from library.training.resuming import states
from tests.lives import Life, assert_same, assert_whole, stored

pytestmark = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")

WARNING = "the training goes on without it"


@pytest.fixture(scope="module")
def previews(tmp_path_factory) -> dict[str, object]:
    """Flags for files and events that are too large for what may be left of a block."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 1 --d 1")
    return {"sample_prompts": prompts, "sample_every_n_steps": 1}


@pytest.fixture
def small(life, previews, tmp_path) -> Iterator[Life]:
    """A run with all of its folders on a disk of 6 MB; `filler` is the file that takes the rest of it."""
    disk = tmp_path / "small"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a disk")
    yield life("small", **previews)
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def whole(fork_server, flags, previews, tmp_path_factory) -> Life:
    life = Life(tmp_path_factory.mktemp("whole"), fork_server, flags, **previews)
    assert life.go_on().status == 0
    return life


def saved(step: int) -> str:
    return f"run-step{step:08d}{states.SUFFIX}\n"


def test_a_run_goes_on_and_saves_again_when_there_is_room(small, whole):
    filler = str(small.output / "filler")
    ended = small.go_on(slow=0.3, when=[(saved(2), ("fill", filler)), ("5/8 [", ("remove", filler))])
    assert ended.status == 0, ended.said
    assert re.search(rf"run-step00000004.safetensors cannot be written: .*No space left.*: {WARNING}", ended.said)
    assert re.search(rf"run_000004_00_.*png cannot be written: No space left.*: {WARNING}", ended.said)
    assert f"the log cannot be written (No space left on device): {WARNING}" in ended.said
    assert "Traceback" not in ended.said
    assert saved(6) in ended.said
    assert_whole(small)
    missing = whole.names(whole.output) - small.names(small.output)
    assert all(re.search(r"0000[345]", name) for name in missing), missing
    assert stored(small.output / "run.safetensors") == stored(whole.output / "run.safetensors")
    logged, all_of_it = ([step for step, _ in run.curves()["loss/current"]] for run in (small, whole))
    assert [step for step in all_of_it if step < 3 or step > 6] == [step for step in logged if step < 3 or step > 6]


@pytest.mark.slow
def test_a_run_that_is_killed_then_goes_on_from_its_last_state(small, whole):
    filler = small.output / "filler"
    small.go_on(slow=0.3, when=[(saved(2), ("fill", str(filler))), ("5/8 [", signal.SIGKILL)])
    assert_whole(small)
    ended = small.go_on()
    assert ended.status == 2, ended.said
    assert_whole(small)
    filler.unlink()
    ended = small.go_on()
    assert f"going on after step 2 with {small.output}" in ended.said
    assert_same(whole, small)


def test_a_run_whose_last_file_does_not_fit_says_so_and_can_be_ended_later(small, whole):
    filler = small.output / "filler"
    ended = small.go_on(slow=0.3, when=[("7/8 [", ("fill", str(filler)))])
    assert ended.status == 2, ended.said
    (sentence,) = re.findall(r"^error: .*", ended.said, re.M)
    assert re.search(r"run.safetensors cannot be written: .*No space left on device", sentence)
    assert "Traceback" not in ended.said
    assert states.read(small.output / saved(6).strip()).step == 6
    filler.unlink()
    assert small.go_on().status == 0
    assert stored(small.output / "run.safetensors") == stored(whole.output / "run.safetensors")
    assert_same(whole, small)
