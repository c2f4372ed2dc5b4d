"""Whole runs with folders of their own, in several processes if they are killed, and what remains of them."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from library.data.caching.npz import read_arrays
from library.models.files.checkpoint import open_weights
from library.training.resuming import states
from tests.fork_server import Ended, ForkServer
from tests.tiny import draw_pictures, read_logs, stored

SAVING = {
    "save_every_n_steps": 2,
    "save_state": True,
    "save_last_n_steps": 4,
    "save_last_n_steps_state": 2,
    "max_train_steps": 8,
    "train_batch_size": 2,
    "resume": "latest",
}
# What is in names besides: when they were given, and by which process.
CHANCES = r"(?<=_)\d{14}(?=_)|^\d{14}(_\d+)?|(?<=tfevents)[\w.-]+"
CURVES = ("loss", "lr", "gradient_norm")
PLACES = ("output", "log", "pictures")


class Life:
    """A run with folders of its own, in several processes if it is killed."""

    def __init__(
        self, folder: Path, server: ForkServer, flags: Callable, script: str = "train_network", **changes: object
    ):
        self.server = server
        self.script = script
        self.output, self.log, self.pictures = (folder / place for place in PLACES)
        self._temporary = TemporaryDirectory()  # not below `folder`: names of sockets in it must be short
        self.temporary = Path(self._temporary.name)
        shown = draw_pictures(self.pictures / "1_sks shape", 6)
        data: dict[str, object] = {"train_data_dir": self.pictures}
        if script == "fine_tune":
            described = {file.stem: {"caption": file.read_text(encoding="utf-8")} for file in shown.glob("*.txt")}
            (self.pictures / "captions.json").write_text(json.dumps(described))
            data = {"train_data_dir": shown, "in_json": self.pictures / "captions.json"}
            data |= {"caption_extension": None, "network_module": None, "train_text_encoder": True}
        elif script in ("train_db", "sdxl_train"):
            data |= {"network_module": None}
        self.words = flags(self.output, **(data | {"logging_dir": self.log} | SAVING | changes))

    def go_on(self, more: Sequence[str] = (), **kill: object) -> Ended:
        """One process of it, with `more` flags that overrule; `kill`: see `ForkServer.run`."""
        return self.server.run([*self.words, *more], self.script, temporary=self.temporary, **kill)

    def names(self, place: Path) -> set[str]:
        return {re.sub(CHANCES, "", str(path.relative_to(place))) for path in place.rglob("*")}

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of everything logged that no clock has a part in, in the order of the log."""
        newest = max(self.log.iterdir())  # of those killed before the first state others may be left
        log = read_logs(newest.parent, newest.name)
        tags = [tag for tag in log.Tags()["scalars"] if tag.startswith(CURVES)]
        return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in tags}


def assert_whole(life: Life) -> None:
    """What has a final name is whole, whenever one looks."""
    for file in (file for place in (life.output, life.pictures) for file in place.rglob("*.*")):
        if any(part.endswith(".tmp") for part in file.parts):
            continue
        if file.suffix == ".safetensors":
            with open_weights(file) as weights:
                weights.verify()
        elif file.suffix == ".npz":
            assert read_arrays(file)
        elif file.suffix == ".png":
            Image.open(file).load()
    for folder in life.output.glob(f"*{states.SUFFIX}"):
        assert states.read(folder) is not None, folder


def assert_tidy(life: Life) -> None:
    """Nothing temporary is left, but for what torchrun leaves of itself whenever it has run. Processes that had to end
    by themselves may be a few seconds late with that.
    """
    for _ in range(200):
        left = [path for path in life.temporary.iterdir() if not path.name.startswith("torchelastic_")]
        if not left:
            break
        time.sleep(0.05)
    assert not left
    assert not list(life.output.rglob("*.tmp"))


def assert_same(whole: Life, broken: Life) -> None:
    assert broken.names(broken.output) == whole.names(whole.output)
    assert broken.names(broken.pictures) == whole.names(whole.pictures)
    assert_tidy(broken)
    assert broken.names(broken.log) == whole.names(whole.log), broken.names(broken.log) ^ whole.names(whole.log)
    for file in whole.output.rglob("*.safetensors"):
        assert stored(broken.output / file.relative_to(whole.output)) == stored(file), file.name
    for folder in whole.output.glob(f"*{states.SUFFIX}"):
        assert states.read(broken.output / folder.name).progress == states.read(folder).progress
    assert broken.curves() == whole.curves()
