"""Runs that go on with a state: what must be as if nothing had happened, and where they start."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from library.training.requests import Requests
from library.training.resuming.resume import restore_scheduler
from tests.tiny import read_logs, scalars, stored

Run = Callable[..., str]

# Six pictures make three steps an epoch. The first epoch is a warm-up, so that the curve of the rate matters.
WHOLE = {
    "max_train_steps": 6,
    "save_state": True,
    "save_every_n_steps": 2,
    "save_every_n_epochs": 1,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3,
    "network_dropout": 0.2,
    "ema": True,
}

SHORT = {"train_batch_size": 6}  # one step an epoch


@pytest.fixture
def run(train, flags, tmp_path, capsys) -> Run:
    """`run(name, **changes)` trains into a folder of this name and returns what was said."""

    def start(name: str, script: str = "train_network", **changes: object) -> str:
        capsys.readouterr()
        train(flags(tmp_path / name, **changes), script=script)
        return said(capsys.readouterr().err)

    return start


@pytest.fixture
def refused(train, flags, tmp_path, capsys) -> Run:
    """`refused(name, **changes)`: the sentence with which such a run ends."""

    def start(name: str, script: str = "train_network", **changes: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            train(flags(tmp_path / name, **changes), script=script)
        (message,) = [line for line in said(capsys.readouterr().err).splitlines() if line.startswith("error: ")]
        return message

    return start


def said(error_stream: str) -> str:
    """Without what a bar has drawn."""
    return "\n".join(line.rpartition("\r")[2].strip() for line in error_stream.splitlines())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def whole(train, flags, shelf) -> Path:
    """The output folder of a run without a break, with a state of every second step. Not to be written to."""
    if not (shelf / "whole").exists():
        train(flags(shelf / "whole", logging_dir=shelf / "logs", **WHOLE))
    return shelf / "whole"


@pytest.fixture
def broken(whole, tmp_path) -> Path:
    """A copy of it as it was when it was killed in its fifth step."""
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    for path in folder.iterdir():
        if path.name.startswith("run-step00000006") or path.name in ("run.safetensors", "run-ema.safetensors"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.rmtree(folder / "run-state")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in folder.iterdir()}


def assert_same(one: Path, other: Path) -> None:
    assert names(one) == names(other)
    for file in one.glob("*.safetensors"):
        assert stored(file) == stored(other / file.name), file.name


# as if nothing had happened


def test_states_are_beside_what_is_saved(whole):
    stems = {"run-step00000002", "run-step00000004", "run-step00000006", "run-000001", "run"}
    expected = {name for stem in stems for name in (stem, f"{stem}-ema", f"{stem}-state")}
    assert names(whole) == expected


@pytest.mark.parametrize("state", ["latest", "folder", "state"])
def test_a_run_goes_on_as_if_nothing_had_happened(run, whole, broken, tmp_path, state):
    resume = {"latest": "latest", "folder": broken, "state": broken / "run-step00000002-state"}[state]
    step = 2 if state == "state" else 4
    message = run("broken", **WHOLE, resume=resume)
    assert f"going on after step {step} with {broken}/run-step{step:08d}-state" in message
    assert_same(whole, broken)


def test_it_goes_on_in_its_log(run, whole, broken, shelf, tmp_path):
    shutil.copytree(shelf / "logs", tmp_path / "logs")
    run("broken", **WHOLE, resume=broken / "run-step00000002-state", logging_dir=tmp_path / "logs")
    logs = [read_logs(folder / "logs") for folder in (shelf, tmp_path)]
    for tag in ("loss/current", "loss/average", "lr/unet"):
        assert list(scalars(logs[1], tag)) == [1, 2, 3, 4, 5, 6]
        assert scalars(logs[0], tag) == scalars(logs[1], tag)


def test_a_name_is_not_needed(run, tmp_path):
    saving = {"output_name": None, "save_state": True, "save_every_n_steps": 1, "save_every_n_epochs": 1, **SHORT}
    run("a", **saving, max_train_steps=2)
    stems = {"at-step00000001", "at-step00000002", "epoch-000001", "last"}
    assert names(tmp_path / "a") == stems | {f"{stem}-state" for stem in stems}
    shutil.rmtree(tmp_path / "a" / "last-state")
    assert "at-step00000002-state" in run("a", **saving, max_train_steps=3, resume="latest")


def test_a_state_at_the_end_alone(run, tmp_path):
    run("a", save_state_on_train_end=True, save_every_n_steps=1, max_train_steps=2)
    assert names(tmp_path / "a") == {"run-step00000001", "run-step00000002", "run", "run-state"}
    run("a", save_state_on_train_end=True, save_every_n_steps=1, max_train_steps=3, resume=tmp_path / "a")
    run("b", max_train_steps=3)
    assert stored(tmp_path / "a" / "run.safetensors") == stored(tmp_path / "b" / "run.safetensors")


def test_outdated_files_go_also_those_from_before_a_break(run, tmp_path):
    saving = {
        "save_state": True,
        "save_every_n_epochs": 1,
        "save_last_n_epochs": 2,
        "save_last_n_epochs_state": 1,
        "save_every_n_steps": 1,
        "save_last_n_steps": 3,
        "save_last_n_steps_state": 1,
        "ema": True,
        **SHORT,
    }
    run("whole", **saving, max_train_steps=6)
    kept = {"run-000004", "run-000005", *(f"run-step{step:08d}" for step in (3, 4, 5, 6)), "run"}
    kept |= {f"{name}-ema" for name in kept}
    states = {"run-000005-state", "run-step00000005-state", "run-step00000006-state", "run-state"}
    assert names(tmp_path / "whole") == kept | states
    run("broken", **saving, max_train_steps=3)
    shutil.rmtree(tmp_path / "broken" / "run-state")  # as if it had been meant to be longer
    run("broken", **saving, max_train_steps=6, resume=tmp_path / "broken" / "run-step00000003-state")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_what_was_saved_because_the_run_had_to_end_is_outdated_in_its_time(run, tmp_path, monkeypatch):
    saving = {"save_every_n_steps": 4, "save_last_n_steps": 2, "max_train_steps": 8, "ema": True}
    words = iter([set(), set(), {"stop"}])
    with monkeypatch.context() as patch:
        patch.setattr(Requests, "heard", lambda self: next(words))
        run("a", **saving)
    assert names(tmp_path / "a") == {"run-step00000003", "run-step00000003-ema", "run-step00000003-state"}
    run("a", **saving, resume="latest")
    # the state stays, for lack of a newer one
    assert names(tmp_path / "a") == {"run-step00000008", "run-step00000008-ema", "run", "run-ema"} | {
        "run-step00000003-state"
    }


def test_states_are_outdated_with_their_files_where_nothing_else_is_said(run, tmp_path):
    run("a", save_state=True, save_every_n_epochs=1, save_last_n_epochs=1, **SHORT)
    assert names(tmp_path / "a") == {"run-000003", "run-000003-state", "run", "run-state"}


def test_a_number_of_files_over_all_epochs(run, tmp_path):
    ratio = {"save_n_epoch_ratio": 3, "save_state": True, **SHORT}
    run("a", **ratio, max_train_epochs=6)
    assert {name for name in names(tmp_path / "a") if "state" not in name} == {"run-000002", "run-000004", "run"}
    (tmp_path / "a" / "run.safetensors").unlink()
    run("a", **ratio, max_train_epochs=6, resume=tmp_path / "a" / "run-000002-state")
    assert {name for name in names(tmp_path / "a") if "state" not in name} == {"run-000002", "run-000004", "run"}


def test_other_models_go_on_too(train, flags, model_files, tmp_path):
    for family, more in (("sdxl", {}), ("sd2", {"v2": True})):
        changes = {"pretrained_model_name_or_path": model_files(family), **SHORT, **more}
        saving = {"save_state": True, "save_every_n_steps": 1, "max_train_steps": 2}
        for name, resume in (("whole", None), ("broken", tmp_path / family / "whole" / "run-step00000001-state")):
            train(flags(tmp_path / family / name, **changes, **saving, resume=resume), sdxl=family == "sdxl")
        assert stored(tmp_path / family / "broken/run.safetensors") == stored(
            tmp_path / family / "whole/run.safetensors"
        )


# the end


def test_a_finished_run_is_left_as_it_is(run, refused, whole, broken, tmp_path):
    shutil.copytree(whole, tmp_path / "done")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()}
    message = run("done", **WHOLE, resume="latest")  # status 0, or this would raise SystemExit
    assert f"nothing is left to train: {tmp_path}/done/run-state is of step 6, and the run ends at step 6" in message
    message = refused("done", **WHOLE, resume=tmp_path / "done" / "run-state")
    assert "is of step 6, and the run ends at step 6: raise --max_train_steps or --max_train_epochs" in message
    assert "is of step 4, and the run ends at step 3: raise" in refused(
        "broken", **WHOLE | {"max_train_steps": 3}, resume="latest"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()} == before


def test_what_was_killed_after_its_last_step_writes_its_file(run, whole, broken, tmp_path):
    for name in ("run-step00000006-state", "run-step00000006.safetensors", "run-step00000006-ema.safetensors"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy2)(whole / name, broken / name)
    assert "the run was stopped before its last files were written" in run("broken", **WHOLE, resume="latest")
    assert_same(whole, broken)


def test_latest_passes_over_a_damaged_state(run, whole, broken):
    (broken / "run-step00000004-state" / "trained.safetensors").write_bytes(b"")
    message = run("broken", **WHOLE, resume="latest")
    assert "run-step00000004-state is incomplete" in message
    assert "going on after step 3 with" in message  # the end of the first epoch
    assert_same(whole, broken)


def test_latest_is_a_new_run_where_there_is_no_state(run, whole, tmp_path):
    assert "--resume latest: there is no state of run" in run("broken", **WHOLE, resume="latest")
    assert_same(whole, tmp_path / "broken")


# where a flag says that it starts


@pytest.fixture
def losses(run, tmp_path):
    """`losses(name, **changes)` of the steps of a run in which nothing is learned."""

    def start(name: str, **changes: object) -> dict[int, float]:
        run(name, learning_rate=1e-30, max_train_steps=6, logging_dir=tmp_path / name / "logs", **changes)
        return scalars(read_logs(tmp_path / name / "logs"), "loss/current")

    return start


def test_a_new_run_may_start_later(losses, tmp_path):
    whole = losses("whole")
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}
    exactly = losses("a", initial_step=4, skip_until_initial_step=True, save_every_n_steps=1, **warmup)
    assert exactly == {step: whole[step] for step in (5, 6)}
    assert names(tmp_path / "a") == {"run-step00000005", "run-step00000006", "run", "logs"}
    rates = scalars(read_logs(tmp_path / "a" / "logs"), "lr/unet")
    assert rates == pytest.approx({5: 0, 6: 0.5e-30})
    second_epoch = {step: whole[step] for step in (4, 5, 6)}
    assert losses("b", initial_step=4) == second_epoch
    assert losses("c", initial_epoch=2) == second_epoch
    assert losses("d", initial_epoch=1, initial_step=5, skip_until_initial_step=True) == {6: whole[6]}


def test_a_flag_overrules_the_step_of_a_state(run, broken, tmp_path):
    message = run("broken", **WHOLE, resume="latest", initial_step=2, skip_until_initial_step=True)
    assert "run-step00000004-state is of step 4, but a flag says that the run starts after step 2" in message
    state = json.loads((broken / "run-state" / "state.json").read_text())
    assert state["progress"]["step"] == 6
    assert "but a flag" not in run("broken", **WHOLE | {"max_train_steps": 8}, resume="latest", initial_epoch=3)


def test_a_start_past_the_end_is_refused(refused):
    sentence = "nothing is left to train: it starts after step {}, and the run ends at step 4"
    assert sentence.format(6) in refused("a", initial_epoch=3)
    assert sentence.format(4) in refused("a", initial_step=4, skip_until_initial_step=True)


# a longer run and other rates


def test_a_longer_run_is_the_same_run(run, tmp_path):
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "network_dropout": 0.2}
    run("whole", **warmup, max_train_steps=5)
    run("broken", **warmup, max_train_steps=2, save_state=True)
    message = run("broken", **warmup, max_train_steps=5, resume="latest")
    assert "learning rate" not in message
    assert stored(tmp_path / "broken" / "run.safetensors") == stored(tmp_path / "whole" / "run.safetensors")


def test_a_curve_that_a_longer_run_would_not_have_had_is_told_of(run):
    warmup = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "50%"}
    run("a", **warmup, max_train_steps=4, save_state=True)
    message = run("a", **warmup, max_train_steps=12, resume="latest", save_state=True)
    assert (
        "the learning rate goes on at 0.00667, by the curve of these flags, and not at 0.01 as in the state" in message
    )
    assert "one of 12 steps would have had other rates in the first 4, so this one becomes another" in message


def test_new_rates_are_shown_beside_the_old_and_win_only_when_told(run, whole, broken, tmp_path):
    other = {"unet_lr": 0.003, "text_encoder_lr": 0.004}
    message = run("broken", **WHOLE, **other, resume=broken / "run-step00000004-state")
    assert "unet learns at 0.01 as before, not at 0.003: --resume_new_learning_rate lets new rates win" in message
    assert "text_encoder learns at 0.01 as before, not at 0.004" in message
    assert_same(whole, broken)
    new = {"resume_new_learning_rate": True, "logging_dir": tmp_path / "logs", **other}
    message = run("broken", **WHOLE, **new, resume=broken / "run-step00000002-state")
    assert "unet learns at 0.003 from here on, and did at 0.01" in message
    assert "the learning rate goes on" not in message
    log = read_logs(tmp_path / "logs")
    assert scalars(log, "lr/unet") == pytest.approx({3: 0.002, 4: 0.003, 5: 0.003, 6: 0.003})
    assert scalars(log, "lr/text_encoder") == pytest.approx({3: 0.004 * 2 / 3, 4: 0.004, 5: 0.004, 6: 0.004})
    # from then on they are the run's own
    again = {**WHOLE, "max_train_steps": 7, "resume": broken / "run-step00000006-state"}
    assert "unet learns at 0.003 as before, not at 0.01" in run("broken", **again)


def test_a_rest_without_a_rate_is_refused(run, refused):
    falling = {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": "step_rules=1:2,0"}
    run("a", **falling, max_train_steps=2, save_state=True)
    message = refused("a", **falling, max_train_steps=5, resume="latest")
    assert "nothing is left to learn: the learning rate is 0 from step 3 to the end" in message


def rates(curve, steps: int, saved: dict | None = None) -> tuple[list[float], dict]:
    """The rates of that many steps, after those of a saved scheduler, and the scheduler's state then."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LambdaLR(optimizer, curve)
    if saved is not None:
        ahead = LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), curve)
        restore_scheduler(scheduler, ahead, saved["last_epoch"], saved)
    taken = []
    for _ in range(steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken, scheduler.state_dict()


@pytest.mark.parametrize(
    "curve",
    [lambda step, total: 1 - step / total, lambda step, total: (1 + torch.tensor(step / total).cos().item()) / 2],
)
def test_falling_rates_go_on_and_are_those_of_the_longer_run(curve, fresh_console, capsys):
    whole, _ = rates(lambda step: curve(step, 8), 8)
    first, saved = rates(lambda step: curve(step, 8), 3)
    second, _ = rates(lambda step: curve(step, 8), 5, saved)
    assert first + second == whole
    assert not capsys.readouterr().err
    longer, _ = rates(lambda step: curve(step, 20), 20)
    extended, _ = rates(lambda step: curve(step, 20), 17, saved)
    assert extended == longer[3:]
    assert re.search(
        r"the learning rate goes on at 0\.\d+, by the curve of these flags, and not at 0\.\d+",
        capsys.readouterr().err,
    )
