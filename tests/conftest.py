"""What tests of several files share: a quiet console, a tiny model file, drawn pictures, and the training script.

Heavy packages are imported inside the fixtures, for the sake of the tests that need none of them.
"""

import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from library import cli, console
from library.options import ConsoleOptions

if TYPE_CHECKING:
    from tests.fork_server import ForkServer
    from tests.lives import Life

# The models are tiny: several threads would wait for each other longer than they compute, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Flags = Callable[..., list[str]]
Train = Callable[..., None]


@pytest.fixture
def fresh_console(monkeypatch) -> Iterator[None]:
    """Nothing said yet, no log file, and this process the first one."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    console.setup(None)
    console.configure(ConsoleOptions())
    yield
    console.setup(None)
    console.configure(ConsoleOptions())
    logging.captureWarnings(False)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the data room tells the user, every time it does."""
    messages = []
    for name, module in list(sys.modules.items()):
        for speaker in ("warn", "notice"):
            if name.startswith("library.data.") and hasattr(module, speaker):
                monkeypatch.setattr(module, speaker, lambda message, **_: messages.append(message))
    return messages


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> Callable[[str], Path]:
    """`model_files(family)`: a model for sizes that are multiples of 4, written when it is first asked for. Not to be
    written to, as all that lasts a session.
    """
    from tests import tiny

    @cache
    def make(family: str) -> Path:
        return tiny.save_model(tmp_path_factory.mktemp(family) / "tiny.safetensors", family)

    return make


@pytest.fixture(scope="session")
def model_file(model_files) -> Path:
    """The same of Stable Diffusion 1.x."""
    return model_files("sd1")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A --train_data_dir of six pictures that are used once per epoch."""
    from tests import tiny

    return tiny.draw_pictures(tmp_path_factory.mktemp("pictures") / "1_sks shape", 6).parent


@pytest.fixture(scope="session")
def metadata_file(pictures, tmp_path_factory) -> Path:
    """--in_json for the six pictures."""
    folder = pictures / "1_sks shape"
    captions = {path.stem: {"caption": path.read_text(), "tags": "drawn"} for path in folder.glob("*.txt")}
    path = tmp_path_factory.mktemp("metadata") / "captions.json"
    path.write_text(json.dumps(captions))
    return path


@pytest.fixture(scope="session")
def flags(model_file, pictures) -> Flags:
    """`flags(output_dir, **changes)`: the words of a short float32 run with seed 1 and batches of 2.

    Changes replace and add flags: True is a flag without a value, a tuple one with several, None leaves one out.
    """

    def make(output_dir: Path, **changes: object) -> list[str]:
        values: dict[str, object] = {
            "pretrained_model_name_or_path": model_file,
            "train_data_dir": pictures,
            "caption_extension": ".txt",
            "resolution": 32,
            "train_batch_size": 2,
            "max_data_loader_n_workers": 0,
            "network_module": "networks.lora",
            "learning_rate": 0.01,
            "max_train_steps": 4,
            "seed": 1,
            "no_rehearsal": True,
            "output_dir": output_dir,
            "output_name": "run",
        } | changes
        words = []
        for name, value in values.items():
            if value is not None:
                several = value if isinstance(value, tuple) else () if value is True else (value,)
                words += [f"--{name}", *map(str, several)]
        return words

    return make


@pytest.fixture(scope="session")
def settled() -> None:
    """What a run imports is there to stay: every run ends with a search for garbage, which need not go through that."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from tests.fork_server import IMPORTED

    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture
def train(monkeypatch, fresh_console, settled) -> Iterator[Train]:
    """`train(words)`: train_network.py, or the `script` of another name, in this process, on the CPU; mistakes are
    SystemExit with code 2. With `sdxl` it is sdxl_train_network.py.
    """
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def run(words: Sequence[str], sdxl: bool = False, script: str = "train_network") -> None:
        forget()
        name = "sdxl_train_network" if sdxl else script
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        cli.run(importlib.import_module(name).main)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield run
    forget()


@pytest.fixture
def run(train, words, request, tmp_path) -> Callable[..., Path]:
    """`run(name, **changes)` trains with the test file's SCRIPT and `words` into a folder of this name and returns the
    file.
    """

    def start(name: str, **changes: object) -> Path:
        train(words(tmp_path / name, **changes), script=request.module.SCRIPT)
        return tmp_path / name / "run.safetensors"

    return start


@pytest.fixture
def refused(run, capsys) -> Callable[..., str]:
    """`refused(**changes)`: the sentence with which a run ends."""

    def start(**changes: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            run("refused", **changes)
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return message

    return start


@pytest.fixture
def mistake(tool, tmp_path, capsys) -> Callable[..., str]:
    """`mistake(words)`: the one sentence with which the `tool` of a file of tests refuses them; what is in `tmp_path`
    stays as it is.
    """

    def contents() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    def call(*words: object) -> str:
        before = contents()
        with pytest.raises(SystemExit) as end:
            tool(*words)
        assert end.value.code == 2
        assert contents() == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return call


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory) -> Iterator["ForkServer"]:
    from tests.fork_server import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def life(fork_server, flags, tmp_path) -> Callable[..., "Life"]:
    """`life(name, script, **changes)`: a run in folders below that name, by default of train_network.py."""
    from tests.lives import Life

    def make(name: str, script: str = "train_network", **changes: object) -> Life:
        return Life(tmp_path / name, fork_server, flags, script, **changes)

    return make
