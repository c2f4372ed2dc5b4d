"""Two processes that are killed, or asked to end, and resumed."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from library.training.resuming import states
from tests.lives import Life, assert_same, assert_tidy, assert_whole, stored
from tests.processes import ACCELERATE, ROOT
from tests.test_kills import chance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs signals"),
]

BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "train_network.py")
ACCELERATE_CPU = (BIN / ACCELERATE[0], *ACCELERATE[1:], "--cpu")


LONG = {"max_train_steps": 60, "save_last_n_steps": 20, "save_last_n_steps_state": 10}
"""Long enough to be met in the midst of it."""


AFTER_15, AFTER_40 = r" (1[5-9]|[2-5]\d)/60 \[", r" (4\d|5\d)/60 \["
"""What the progress bar shows then."""


class Launched:
    """A launcher and the processes that it starts, and what they print."""

    def __init__(self, command: Sequence[str | Path], output: Path, environment: dict[str, str]):
        self.output = output
        with output.open("wb") as sink:
            self.process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.said) and self.process.poll() is None:
            time.sleep(0.02)

    def kill(self) -> None:
        """All processes at once."""
        mine = psutil.Process(self.process.pid)
        for process in [mine, *mine.children(recursive=True)]:
            process.kill()
        self.process.wait()

    def end(self) -> int:
        return self.process.wait(timeout=120)


@pytest.fixture
def launch(tmp_path, monkeypatch) -> Callable[..., Launched]:
    """`launch(life, command)`: the run of that life."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(life: Life, command: Sequence[str | Path]) -> Launched:
        monkeypatch.setenv("TMPDIR", str(life.temporary))
        return Launched([*command, *life.words], tmp_path / "said.txt", None)

    return start


def test_two_processes_that_are_killed_go_on(life, launch):
    drawn = chance()
    whole, broken = (life(name, **LONG, save_every_n_steps=10) for name in ("whole", "broken"))
    assert launch(whole, TORCHRUN).end() == 0
    for text in ("per epoch", AFTER_15):
        run = launch(broken, TORCHRUN)
        run.wait_for(text)
        time.sleep(drawn.uniform(0, 1.5))
        run.kill()
        assert_whole(broken)
    run = launch(broken, TORCHRUN)
    assert run.end() == 0, run.said
    assert_same(whole, broken)


def test_two_processes_end_together_when_their_launcher_is_asked_to(life, launch):
    whole, asked = (life(name, save_state=None, save_every_n_steps=None, **LONG) for name in ("whole", "asked"))
    assert launch(whole, TORCHRUN).end() == 0
    run = launch(asked, TORCHRUN)
    run.wait_for(AFTER_15)
    run.process.send_signal(signal.SIGTERM)
    run.end()
    assert len(re.findall(r"ended by SIGTERM after step \d+ of 60", run.said)) == 1, run.said
    assert "another process" not in run.said
    (state,) = asked.output.glob(f"*{states.SUFFIX}")
    assert states.read(state).step >= 15
    (asked.output / "run.control").write_text("stop")  # of before
    run = launch(asked, TORCHRUN)
    run.wait_for(AFTER_40)
    (asked.output / "run.control").write_text("stop")
    assert run.end() == 0, run.said
    assert "ended as the control file asks" in run.said
    run = launch(asked, TORCHRUN)
    assert run.end() == 0, run.said
    assert stored(asked.output / "run.safetensors") == stored(whole.output / "run.safetensors")
    assert asked.curves() == whole.curves()
    assert_tidy(asked)


@pytest.mark.parametrize("script", ["train_network", "fine_tune"])
def test_a_run_of_accelerate_launch_that_is_killed_goes_on(life, launch, script):
    drawn = chance()
    whole, broken = (life(name, script, save_every_n_steps=10, **LONG) for name in ("whole", "broken"))
    command = (*ACCELERATE_CPU, f"{script}.py")
    assert launch(whole, command).end() == 0
    run = launch(broken, command)
    run.wait_for(f"run-step00000010{states.SUFFIX}\n")
    time.sleep(drawn.uniform(0, 1))
    run.kill()
    assert_whole(broken)
    run = launch(broken, command)
    assert run.end() == 0, run.said
    assert_same(whole, broken)
