"""Files and states that cannot be written, and those of other runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.models.writing import overflowing
from library.options.saving import SaveOptions
from library.training import events
from library.training.optimization.stepper import Stepper
from library.training.resuming.state import Progress, TrainState
from library.training.saving import Saver, all_finite
from tests.tiny import make_model, stored

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
    for value, lost, finite in ((65519.0, [], True), (-65520.0, ["weight"], True), (float("nan"), [], False)):
        module.weight.data[0, 1] = value
        assert (overflowing(module, torch.float16), all_finite(module)) == (lost, finite)
        assert overflowing(module, torch.bfloat16) == []
    module.weight.data.fill_(3e38)  # whose sum is not finite
    assert all_finite(module)


def test_weights_too_large_for_their_file_are_kept_in_the_state(train, flags, tmp_path, huge, capsys):
    huge(2)
    saving = {"save_precision": "fp16", "save_every_n_steps": 1, "max_train_steps": 2, **SHORT}
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **saving))
    said = capsys.readouterr().err
    why = "the weights after step 2 are too large for the float16 that they are saved in (1 of their tensors: lora_te_"
    assert why in said
    advice = "so no file is written: use --save_precision float or bf16"
    assert f"{advice}: the training goes on without it" in said
    assert last_words(said).endswith(f"{advice}; --resume latest tries it again")
    state = "run-step00000002-state"
    assert {path.name for path in tmp_path.iterdir()} == {"run-step00000001.safetensors", state}
    train(flags(tmp_path, **saving | {"save_precision": "bf16"}, resume="latest"))
    assert stored(tmp_path / "run.safetensors")


@pytest.mark.parametrize(("no_rehearsal", "when"), [(None, "before the first step"), (True, "after step 1")])
def test_weights_that_are_saved_along_are_not_turned_into_infinities(
    train, flags, tmp_path, capsys, no_rehearsal, when
):
    """Those of an autoencoder that nothing trains; the rehearsal says so at once."""
    model = make_model()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = 1e6
    model.save(tmp_path / "base.safetensors")
    changes = {"pretrained_model_name_or_path": tmp_path / "base.safetensors", "network_module": None, **SHORT}
    changes |= {"max_train_steps": 1, "learning_rate": 1e-4, "no_rehearsal": no_rehearsal}
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", **changes, save_precision="fp16"), script="train_db")
    tensors = "(1 of their tensors: vae.decoder.conv_out.bias)"
    said = last_words(capsys.readouterr().err)
    assert f"the weights {when} are too large for the float16 that they are saved in {tensors}" in said
    assert not list((tmp_path / "out").glob("run.safetensors"))
    train(flags(tmp_path / "out", **changes, save_precision="bf16"), script="train_db")
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "run.safetensors").values())


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
