"""The log of a run: one curve however often the run is resumed, the trackers, and what they must not learn."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from library import cli, console, options
from library.errors import UserError
from library.options import LogOptions, Settings
from library.training.logs import open_log, run_folder
from library.training.resuming.state import Progress
from library.training.trackers import check_trackers, public_config, public_value
from tests.tiny import EventAccumulator

KEY = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.usefixtures("fresh_console")


@pytest.fixture(autouse=True)
def wandb_offline(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "")  # the run sets it, which is undone at the end
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # else the next test has the settings of this one


def settings_of(**values: object) -> Settings:
    return Settings({LogOptions: LogOptions(**values)}, frozenset(values))


class Log:
    """A run's log in a --logging_dir, until it is abandoned."""

    def __init__(self, root: Path, step: int = 0, continued: dict | None = None):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = settings_of(logging_dir=str(root))
        self.folder = run_folder(settings[LogOptions], continued)
        self.accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=self.folder)
        self.continued = open_log(settings, "network_train", self.accelerator, Progress(100, 1, step), continued)

    def steps(self, first: int, last: int, value: float) -> None:
        for step in range(first, last + 1):
            self.accelerator.log({"loss/current": value}, step=step)


def curve(folder: Path) -> list[tuple[int, float]]:
    log = EventAccumulator(str(folder / "network_train"), {"scalars": 0})
    log.Reload()
    return [(event.step, event.value) for event in log.Scalars("loss/current")]


def cut_tail(folder: Path) -> None:
    """What a kill while an event is written leaves."""
    newest = max((folder / "network_train").glob("events.*"))
    newest.write_bytes(newest.read_bytes()[:-5])


def test_a_run_that_is_resumed_twice_has_one_curve(tmp_path):
    first = Log(tmp_path)
    first.steps(1, 6, 1.0)
    cut_tail(first.folder)
    second = Log(tmp_path, step=3, continued=first.continued)
    assert second.folder == first.folder
    second.steps(4, 8, 2.0)
    cut_tail(first.folder)
    third = Log(tmp_path, step=3, continued=second.continued)
    third.steps(4, 5, 3.0)
    fourth = Log(tmp_path, step=5, continued=third.continued)
    fourth.steps(6, 7, 4.0)
    assert curve(first.folder) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, 3.0), (6, 4.0), (7, 4.0)]
    assert len(list(tmp_path.iterdir())) == 1
    seconds = {path.name.split(".")[3] for path in (first.folder / "network_train").glob("events.*")}
    assert len(seconds) == 4  # else the process numbers would decide in which order the files are read


def test_a_log_that_is_gone_is_begun_anew_with_a_notice(tmp_path, capsys):
    continued = {"folder": "20200101000000", "wandb_id": None}
    log = Log(tmp_path, step=3, continued=continued)
    log.steps(4, 4, 1.0)
    assert log.folder.name != "20200101000000"
    assert curve(log.folder) == [(4, 1.0)]
    assert "20200101000000: the log of the resumed run is not there, a new one begins" in capsys.readouterr().err


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_both_trackers_log_a_run_and_its_settings_but_no_secrets_and_no_folders(train, flags, tmp_path, capfd):
    logs = tmp_path / "logs"
    config = tmp_path / "trackers.toml"
    config.write_text('[tensorboard]\nfilename_suffix = ".mine"\n[wandb]\ntags = ["my tag"]\n')
    changes = {"log_with": "all", "log_config": True, "log_tracker_name": "project", "log_tracker_config": config}
    words = flags(tmp_path / "out", logging_dir=logs, max_train_steps=2, wandb_run_name="one name", **changes)
    messages = tmp_path / "console.log"
    train([*words, f"--wandb_api_key={KEY}", "--console_log_simple", "--console_log_file", str(messages)])
    (folder,) = logs.iterdir()
    (events,) = (folder / "project").glob("events.*.mine")
    of_tensorboard = contents(folder / "project")
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    of_wandb = file.read_bytes()
    for name in (b"loss/current", b"loss/average", b"lr/unet", b"gradient_norm", b"images_per_second", b"memory"):
        assert name in events.read_bytes()
        assert name in of_wandb
    for log in (of_tensorboard, of_wandb):
        assert b"max_train_steps" in log
        assert b"network_module" in log
        assert b"output_dir" in log
        assert str(tmp_path / "out").encode() not in log
    assert b"one name" in of_wandb
    assert b"my tag" in of_wandb
    assert KEY.encode() not in contents(tmp_path)
    shown = capfd.readouterr().err
    assert "wandb sync" in shown
    assert KEY not in shown
    assert "wandb:" not in shown
    assert "training: 100% 2/2 [" in shown
    assert "wandb sync" in messages.read_text(encoding="utf-8")


def test_wandb_alone_goes_on_under_its_id_and_shows_pictures(tmp_path, monkeypatch):
    import wandb

    from library.training.tracking import Tracker

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = settings_of(log_with="wandb")
    assert run_folder(settings[LogOptions]) is None
    accelerator = Accelerator(cpu=True, log_with=["wandb"])
    progress = Progress(10, 1, 3)
    continued = open_log(settings, "network_train", accelerator, progress, {"folder": None, "wandb_id": "known123"})
    assert continued == {"folder": None, "wandb_id": "known123"}
    assert (wandb.run.id, wandb.run.settings.resume) == ("known123", "allow")
    tracker = Tracker(accelerator, lambda batch: None, str)
    tracker.log.pictures({"preview": Image.fromarray(np.zeros((4, 4, 3), np.uint8))}, 3)
    accelerator.end_training()
    assert list(tmp_path.rglob("media/images/preview*.png"))


def test_wandb_without_a_key_does_not_wait_for_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with=["wandb"])
    with pytest.raises(UserError, match="needs your key: run `wandb login`"):
        open_log(settings_of(log_with="wandb"), "network_train", accelerator, Progress(10, 1))
    with pytest.raises(UserError, match=r"cannot log this run: .*40"):
        open_log(settings_of(log_with="wandb", wandb_api_key="short"), "x", accelerator, Progress(10, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[wandbb]\nx = 1", r"trackers\.toml: wandbb is no tracker, use .*did you mean wandb"),
        ("wandb = 1", r"wandb is to be a table"),
        (None, "there is no such tracker configuration"),
    ],
)
def test_mistakes_in_the_tracker_configuration(tmp_path, text, message):
    path = tmp_path / "trackers.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        check_trackers(LogOptions(logging_dir="logs", log_tracker_config=str(path)))


def test_a_setting_that_a_tracker_does_not_know(tmp_path):
    path = tmp_path / "trackers.toml"
    path.write_text("[tensorboard]\nflush = 3")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    settings = settings_of(logging_dir=str(tmp_path), log_tracker_config=str(path))
    with pytest.raises(UserError, match=r"trackers\.toml: a tracker does not know a setting \(.*'flush'"):
        open_log(settings, "x", accelerator, Progress(10, 1))


def test_wandb_is_asked_for_before_it_is_imported(train, flags, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "wandb" and found(name, *rest)) or None
    )
    with pytest.raises(SystemExit) as end:
        train(flags(tmp_path / "out", log_with="wandb"))
    assert end.value.code == 2
    assert "-m pip install wandb" in capsys.readouterr().err


def test_what_is_public_of_the_settings(tmp_path):
    words = [
        *("--wandb_api_key", KEY),
        *("--output_dir", str(tmp_path / "private" / "out")),
        *("--train_data_dir", str(tmp_path)),
        *("--pretrained_model_name_or_path", "owner/model"),
        *("--optimizer_args", f"file={tmp_path}/weights", "eps=1e-6"),
    ]
    settings = cli.parse(options.TRAINING, words, description="")
    assert "wandb_api_key" not in settings.flat()
    assert settings.flat()["output_dir"] == str(tmp_path / "private" / "out")
    config = public_config(settings)
    assert (config["output_dir"], config["train_data_dir"]) == ("out", tmp_path.name)
    assert config["pretrained_model_name_or_path"] == "owner/model"
    assert config["optimizer_args"] == "file=weights eps=1e-6"
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("weights=0.5,/home/alice/x.pt", "weights=0.5,x.pt"),
        ("/home/alice,bob/x.pt", "x.pt"),
        ("/home/alice=bob/x.pt", "x.pt"),
        ("data/alice=1;y=data/alice/x", "alice=1;y=x"),
        (r"C:\Users\alice\x", "x"),
        (Path(r"C:\Users\alice\x"), "x"),
        ("./alice/secret/", "secret"),
        ("data/alice/x", "x"),
        ("networks.lora", "networks.lora"),
        ("betas=.9,.999", "betas=.9,.999"),
        (", ", ", "),
    ],
)
def test_paths_are_not_public_but_for_their_last_part(value, public):
    assert public_value(value) == public


def test_messages_are_appended_when_a_run_goes_on(tmp_path):
    for text in ("first", "second"):
        console.setup(tmp_path / "messages.log")
        console.notice(text)
    assert [line.rsplit(" ", 1)[1] for line in (tmp_path / "messages.log").read_text().splitlines()] == [
        "first",
        "second",
    ]
