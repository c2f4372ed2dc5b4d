"""Training runs in forked processes, which need not import anything and so can be killed by the dozen.

As a program it takes orders on its standard input, one JSON object a line, and answers each with the exit status.
"""

import atexit
import builtins
import gc
import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WRITES = 2
"""So many writes to each file are counted: a model has hundreds of them."""
IMPORTED = (
    "library.training.launch",
    "library.training.methods.finetune",
    "library.training.methods.network",
    "library.training.methods.textual_inversion",
    "torch.utils.tensorboard",
)
"""What runs import."""
PATIENCE = 120.0
"""Seconds for a run of several processes."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, negative for a signal, what it printed, how long it took, and its operations
    on files if these were counted.
    """

    status: int
    said: str
    seconds: float
    operations: int


class ForkServer:
    """Runs scripts of the repository. Close it at the end."""

    def __init__(self, folder: Path):
        self.output, self.counter = folder / "said.txt", folder / "operations.txt"
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.output), str(self.counter)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(
        self,
        words: Sequence[str],
        script: str = "train_network",
        *,
        after: float = 0,
        at: int = 0,
        by: int = signal.SIGKILL,
        when: Sequence[tuple[str, Any]] = (),
        temporary: Path | None = None,
        slow: float = 0,
        processes: int = 1,
        how: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a script. It is killed `after` so many seconds, or by its `at`-th operation on files (of -1, they are
        counted), if these are given; `by` another signal if that is given.

        `when` says what is done, one after the other, once the run has printed a text: a signal is sent to all of its
        processes (a number), or what ACTIONS knows is done (its name, and a path). `temporary`: where its temporary
        files go. `slow`: seconds that each step takes longer. `processes`: as many as torchrun would start; the status
        is that of the first one that failed. `how`: what tests/distributed.py changes. `environment`: more variables.
        """
        self.counter.write_text("0")
        order = {
            "script": script,
            "words": list(words),
            "after": after,
            "at": at,
            "by": by,
            "when": list(when),
            "temporary": temporary and str(temporary),
            "slow": slow,
            "processes": processes,
            "how": list(how),
            "environment": dict(environment or {}),
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        said = self.output.read_text(encoding="utf-8")
        return Ended(answer["status"], said, answer["seconds"], int(self.counter.read_text()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(output: str, counter: str) -> None:
    sys.path.insert(0, str(ROOT))
    from library import console

    with console.quiet_dependencies():
        for name in IMPORTED:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the children would copy every page of memory that has an object on it
    for line in sys.stdin:
        order = json.loads(line)
        start = time.monotonic()
        Path(output).write_text("")
        child, *others = _start(order, output, counter)
        if order["after"]:
            _wait(child, lambda end=start + order["after"]: time.monotonic() >= end)
            _send(child, order["by"])
        for text, action in order["when"]:
            _wait(child, lambda text=text: text in Path(output).read_text(encoding="utf-8"))
            _send(child, action) if isinstance(action, int) else ACTIONS[action[0]](*action[1:])
        if others:
            _wait_for_all([child, *others], start + PATIENCE)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in (child, *others)]
        answer = {"status": next(filter(None, statuses), 0), "seconds": time.monotonic() - start}
        print(json.dumps(answer), flush=True)


def _start(order: dict[str, Any], output: str, counter: str) -> list[int]:
    """The processes of a run, in a group of their own that has the number of the first one."""
    children: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for rank in range(order["processes"]):
        if order["processes"] > 1:
            order["environment"] |= _place(rank, order["processes"], port)
        child = os.fork()
        leader = children[0] if children else 0
        if not child:
            _train(order, output, counter, leader)
        with suppress(OSError):  # the child does it, too: nobody knows who is first
            os.setpgid(child, leader or child)
        children.append(child)
    return children


def _place(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _wait_for_all(children: Sequence[int], deadline: float) -> None:
    """Processes that wait for each other forever are killed."""
    for child in children:
        _wait(child, lambda: time.monotonic() >= deadline)
        _send(child, signal.SIGKILL)


def _wait(child: int, is_time: Callable[[], bool]) -> None:
    while not is_time() and not _ended(child):
        time.sleep(0.005)


def _send(child: int, number: int) -> None:
    if not _ended(child):
        os.killpg(os.getpgid(child), number)


def _fill(file: str) -> None:
    """Leave no space on the disk of a file that is made."""
    with open(file, "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            return


def _write(file: str, text: str) -> None:
    Path(file).write_text(text, encoding="utf-8")


ACTIONS: dict[str, Callable[..., None]] = {"fill": _fill, "remove": os.unlink, "write": _write}


def _ended(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _train(order: dict[str, Any], output: str, counter: str, leader: int) -> None:
    """The child: does what `python <script>.py <words>` does in a terminal, which signals to all processes at once."""
    os.setpgid(0, leader)
    os.environ.update(order["environment"])
    sink = os.open(output, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, sink), (2, sink)):
        os.dup2(source, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    tempfile.tempdir = order["temporary"]
    if order["slow"]:
        _slow_down(order["slow"])
    if order["at"]:
        _die_at(order["at"], order["by"], counter)
    if order["how"]:
        from tests import distributed

        for name in order["how"]:
            getattr(distributed, name)()
    from library import cli

    sys.argv = [f"{order['script']}.py", *order["words"]]
    cli.run(importlib.import_module(order["script"]).main)
    sys.exit(0)


def _slow_down(seconds: float) -> None:
    from library.training.optimization.stepper import Stepper

    step = Stepper.step
    Stepper.step = lambda self: (step(self), time.sleep(seconds))[0]


def _die_at(last: int, number: int, counter: str) -> None:
    """Have this process sent a signal before its `last` operation that changes files, or in the middle of it if it
    writes and the signal kills. The number of operations is left in the file `counter`.
    """
    done, plain_open, owner = 0, builtins.open, os.getpid()

    def count() -> bool:
        """Whether this is the operation to die of."""
        nonlocal done
        done += os.getpid() == owner
        return done == last

    def die() -> None:
        os.kill(os.getpid(), number)

    def counted(function):
        def call(*arguments, **keywords):
            if count():
                die()
            return function(*arguments, **keywords)

        return call

    class Writer(io.BufferedWriter):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes <= WRITES and count():
                if number == signal.SIGKILL:
                    super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                    self.flush()
                die()
            return super().write(data)

    def opened(file, mode="r", buffering=-1, *arguments, **keywords):
        if set(mode) & set("wax+") and count():
            die()
        if mode in ("wb", "ab") and buffering == -1 and "opener" not in keywords:
            return Writer(io.FileIO(file, mode[0]))
        return plain_open(file, mode, buffering, *arguments, **keywords)

    builtins.open = io.open = opened  # the latter is pathlib's
    for name in ("replace", "rename", "unlink", "remove", "fsync", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

    @atexit.register
    def told() -> None:
        if os.getpid() == owner:
            Path(counter).write_text(str(done))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
