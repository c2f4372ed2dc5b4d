"""Files and states that cannot be written, and those of other runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.options.saving import SaveOptions
from library.training import events
from library.training.optimization.stepper import Stepper
from library.training.resuming.state import Progress, TrainState
from library.training.saving import Saver, all_finite
from tests.tiny import stored

SHORT = {"train_batch_size": 6}  # one step an epoch


def last_words(text: str) -> str:
    """The sentence about a run's end."""
    return [line for line in text.splitlines() if "error: " in line or "ended " in line][-1]


@pytest.fixture
def huge(monkeypatch):
    """`huge(step)`: after this step one weight is too large for fp16."""
    move, steps = Stepper.step, []

    def at(step: int) -> None:
        def moved(self):
            info = move(self)
            steps.append(None)
            if len(steps) == step:
                with torch.no_grad():
                    self.parameters[0].view(-1)[0] = 65520.0
            return info

        monkeypatch.setattr(Stepper, "step", moved)

    return at


def test_values_are_judged_in_the_type_they_are_saved_in():
    module = nn.Linear(2, 2)
    for value, half, full in ((65519.0, True, True), (-65520.0, False, True), (float("nan"), False, False)):
        module.weight.data[0, 1] = value
        assert (all_finite(module, torch.float16), all_finite(module)) == (half, full)
    module.weight.data.fill_(3e38)  # whose sum is not finite
    assert all_finite(module)


def test_weights_too_large_for_their_file_are_kept_in_the_state(train, flags, tmp_path, huge, capsys):
    huge(2)
    saving = {"save_precision": "fp16", "save_every_n_steps": 1, "max_train_steps": 2, **SHORT}
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **saving))
    said = capsys.readouterr().err
    why = "the weights after step 2 are too large for the float16 that they are saved in, so no file is written"
    assert f"{why}: use --save_precision float or bf16: the training goes on without it" in said
    assert last_words(said).endswith(f"{why}: use --save_precision float or bf16; --resume latest tries it again")
    state = "run-step00000002-state"
    assert {path.name for path in tmp_path.iterdir()} == {"run-step00000001.safetensors", state}
    train(flags(tmp_path, **saving | {"save_precision": "bf16"}, resume="latest"))
    assert stored(tmp_path / "run.safetensors")


def test_a_run_of_another_name_lets_the_files_of_the_state_s_be(train, flags, tmp_path):
    saving = {"save_every_n_steps": 1, "save_state": True, "save_last_n_steps": 1, **SHORT}
    train(flags(tmp_path, **saving, max_train_steps=2))
    before = {path.name for path in tmp_path.iterdir()}
    state = tmp_path / "run-step00000002-state"
    train(flags(tmp_path, **saving, max_train_steps=3, resume=state, output_name="other"))
    assert before <= {path.name for path in tmp_path.iterdir()}


def test_only_names_of_the_run_are_taken_from_a_state(tmp_path):
    parts = dict.fromkeys(("method", "dtype", "describe", "published", "tracker", "ema", "uploader"))
    state = SimpleNamespace(progress=Progress(9, 1, step=9))
    saver = Saver(SaveOptions(save_last_n_steps=1), tmp_path / "run", state=state, **parts)
    steps = {
        1: ["../run.safetensors"],
        2: ["runs.txt"],
        9: ["run-step00000009-ema.ckpt"],
    }
    for names in steps.values():
        (tmp_path / names[0]).touch()
    saver.load_state_dict({"steps": steps})
    assert saver.series["steps"].written == {9: ["run-step00000009-ema.ckpt"]}
    assert all((tmp_path / names[0]).exists() for names in steps.values())
    saver.load_state_dict({"name": "another", "steps": {5: ["run-step00000005.ckpt"]}})
    assert saver.series["steps"].written == {9: ["run-step00000009-ema.ckpt"]}


@pytest.mark.parametrize(
    ("fails_at", "then"),
    [
        ((), "--resume latest goes on from there"),
        ((2,), "no state could be written, so --resume latest goes on after step 1, and the rest is lost"),
        ((1, 2), "no state could be written, and there is none of before to go on from"),
    ],
)
def test_a_run_that_is_asked_to_end_says_what_there_is_to_go_on_from(
    train, flags, tmp_path, monkeypatch, capsys, fails_at, then
):
    save = TrainState.save

    def write(self, folder: Path) -> None:
        if self.progress.step in fails_at:
            raise UserError("there is no room")
        save(self, folder)

    monkeypatch.setattr(TrainState, "save", write)
    monkeypatch.setattr(
        events.Obey,
        "__call__",
        lambda self, progress, call=events.Obey.__call__: (
            progress.step == 2 and self.requests.noted.add("SIGTERM"),
            call(self, progress),
        )[1],
    )
    with pytest.raises(SystemExit) as end:
        train(flags(tmp_path, save_state=True, save_every_n_epochs=1, max_train_steps=3, **SHORT))
    assert end.value.code == 143
    assert f"ended by SIGTERM after step 2 of 3: {then}" in last_words(capsys.readouterr().err)
