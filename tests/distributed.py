"""Training as one of several processes, with something done on purpose: `-m tests.distributed HOW... -- WORDS`.

Each HOW is the name of a function below, done before train_network.py is run with WORDS.
"""

import hashlib
import os
import signal
import sys
import time
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

import train_network
from library import cli, console
from library.errors import UserError
from library.training import launch, step
from library.training.device import accelerator, engines
from library.training.health import NotFinite
from library.training.optimization import stepper
from library.training.previews import Previewer
from library.training.resuming.state import TrainState
from library.training.saving import Saver

FIRST = console.rank() == 0
SLOW = 6.0  # seconds
ACCELERATORS = []
connection = accelerator.connection
accelerator.Accelerator = lambda **keywords: (ACCELERATORS.append(made := Accelerator(**keywords)), made)[1]


def impatient() -> None:
    """Five seconds without a word from the others are an error."""
    accelerator.connection = lambda *arguments: {**connection(*arguments), "timeout": timedelta(seconds=5)}


def slow_preview() -> None:
    paint = Previewer._paint
    Previewer._paint = lambda *arguments: (time.sleep(SLOW), paint(*arguments))[1]


def slow_cache() -> None:
    """The first process alone is slow."""
    prepare = launch.prepare_caches
    launch.prepare_caches = lambda *given, **named: (time.sleep(SLOW if FIRST else 0), prepare(*given, **named))[1]


def killed() -> None:
    """The second process, in its third step; the first one then waits for its gradients."""
    steps, move = [], stepper.Stepper.step

    def last_step(self):
        steps.append(None)
        if len(steps) == 3 and not FIRST:
            os.kill(os.getpid(), signal.SIGKILL)
        return move(self)

    stepper.Stepper.step = last_step


def mistaken() -> None:
    """The first process finds that all is lost while it writes a file; the second one waits for it."""

    def write(*arguments):
        time.sleep(1)
        raise NotFinite("something is wrong here")

    Saver._write = write


def out_of_room() -> None:
    """The first process cannot write its first state."""
    save, tried = TrainState.save, []

    def write(self, folder):
        tried.append(folder)
        if len(tried) == 1:
            raise UserError("there is no room")
        save(self, folder)

    TrainState.save = write


def telling() -> None:
    """Each process says after every step what its weights are, and what noise its images got."""
    move, draw = stepper.Stepper.step, step.sample_noise

    def moved(self):
        info = move(self)
        weights = b"".join(parameter.detach().view(torch.uint8).numpy().tobytes() for parameter in self.parameters)
        print(f"WEIGHTS <{hashlib.sha256(weights).hexdigest()}>", flush=True)
        return info

    def drawn(*arguments):
        noise = draw(*arguments)
        print(f"NOISE <{hashlib.sha256(noise.numpy().tobytes()).hexdigest()}>", flush=True)
        return noise

    stepper.Stepper.step, step.sample_noise = moved, drawn


def spread() -> None:
    """Each process says what runs the model, if no parameter is whole in it."""
    train = launch.train

    def told(*, root, **others):
        assert all(isinstance(parameter, DTensor) for parameter in root.parameters())
        print(f"SPREAD <{engines.engine(ACCELERATORS[0])}>", flush=True)
        train(root=root, **others)

    launch.train = told


def on_cpu() -> None:
    """accelerate spreads a model over GPUs only; torch does not mind."""
    start = PartialState.__init__

    def pretend(self, *arguments, **keywords):
        start(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


if __name__ == "__main__":
    split = sys.argv.index("--")
    for how in sys.argv[1:split]:
        globals()[how]()
    sys.argv = ["train_network.py", *sys.argv[split + 1 :]]
    torch.set_num_threads(1)
    cli.run(train_network.main)
