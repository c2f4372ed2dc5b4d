"""Every optimizer trains the tiny model, goes on where it was stopped, and logs its rates."""

import pytest

from library.models.files.checkpoint import open_weights
from library.options.optimizer import OPTIMIZERS
from library.training.resuming import states
from library.training.resuming.state import read_objects
from tests.quadratic import options
from tests.tiny import read_logs, scalars, stored

QUICK = ("AdEMAMix8bit", "AdaFactor", "DAdaptAdanIP", "DAdaptSGD", "SGDScheduleFree")
OTHERS = ("rmsprop", "bitsandbytes.optim.adagrad.Adagrad8bit")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*OPTIMIZERS, *OTHERS) if name not in QUICK]
RATES = ("lr/text_encoder", "lr/unet")


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_a_run_in_two_parts_ends_as_one_in_one(name, flags, train, tmp_path):
    # which else takes no step before the fifth
    chosen = options(name, *(["silent_sgd_phase=False"] if name == "RAdamScheduleFree" else []))
    changes = {
        "optimizer_type": name,
        "optimizer_args": chosen.optimizer_args or None,
        "learning_rate": chosen.learning_rate,
        "text_encoder_lr": chosen.learning_rate / 2,
        "network_dim": 64,  # weights of the size from which 8 bits are enough
        "save_state": True,
        "save_every_n_steps": 2,
        "save_precision": "float",
    }
    train(flags(tmp_path / "whole", **changes, logging_dir=tmp_path / "whole logs"))
    half = tmp_path / "whole" / "run-step00000002-state"
    train(flags(tmp_path / "parts", **changes, resume=half, logging_dir=tmp_path / "parts logs"))
    for file in ("run.safetensors", "run-state/trained.safetensors", "run-state/objects.safetensors"):
        assert stored(tmp_path / "parts" / file) == stored(tmp_path / "whole" / file), file
    assert stored(tmp_path / "whole" / "run-step00000002.safetensors") != stored(tmp_path / "whole" / "run.safetensors")
    for tag in RATES:
        whole, parts = (scalars(read_logs(tmp_path / f"{which} logs"), tag) for which in ("whole", "parts"))
        assert list(whole) == [1, 2, 3, 4]
        assert whole.items() >= {step: parts[step] for step in (3, 4)}.items()
        assert whole[4] > 0


@pytest.fixture
def said(train, flags, tmp_path, capsys):
    """`said(name, **changes)` trains into a folder of this name and returns the lines that were said of rates."""

    def run(name: str, **changes: object) -> list[str]:
        capsys.readouterr()
        train(flags(tmp_path / name, save_state=True, **changes))
        output = capsys.readouterr()
        lines = [line for line in (output.out + output.err).splitlines() if "training: " not in line]
        return [line for line in lines if any(word in line for word in ("rate", "Ada", "-optimizer", "betas", "lr_"))]

    return run


OWN = (
    "AdaFactor chooses the learning rate itself (relative_step=True), so that those given (text_encoder 0.01, unet "
    "0.01) have no effect unless they are 0; relative_step=False in --optimizer_args lets them"
)
WITHOUT = (
    "AdaFactor with relative_step=False is usually given --lr_scheduler constant_with_warmup and --max_grad_norm 0"
)
COSINE = (
    "--lr_scheduler cosine has no effect: Adafactor finds the size of its steps itself, unless --optimizer_args "
    "relative_step=False is given"
)


@pytest.mark.parametrize(
    ("changes", "rate", "sentences"),
    [
        ({}, "of its own", [OWN]),
        ({"lr_scheduler": "cosine"}, "of its own", [COSINE, OWN]),
        ({"optimizer_args": "relative_step=False"}, "0.01", [WITHOUT]),
    ],
)
def test_what_matters_of_adafactor_is_said_once(said, tmp_path, changes, rate, sentences):
    table, lines = [f"learning rate {rate}"] * 2, said("a", optimizer_type="AdaFactor", max_train_steps=2, **changes)
    assert [line.split(", ")[-1] for line in lines if line.startswith("trained: ")] == table
    assert [line for line in lines if not line.startswith("trained: ")] == sentences
    if rate == "of its own":
        going = {"resume": tmp_path / "a" / "run-state", "learning_rate": 0.1, "max_train_steps": 4}
        lines = said("a", optimizer_type="AdaFactor", **going, **changes)
        assert not [line for line in lines if " learns at " in line]


def groups_of(folder) -> list[dict]:
    return read_objects(states.read(folder))["optimizer"]["param_groups"]


def test_arguments_of_the_state_stay_and_files_tell_them(said, tmp_path):
    said("a", optimizer_args="weight_decay=0.2", max_train_steps=1)
    for steps in (2, 3):
        other = {"optimizer_args": "eps=1e-6", "max_train_steps": steps, "resume": "latest"}
        lines = said("a", **other)
        (line,) = [line for line in lines if "--optimizer_args" in line]
        assert line.endswith(
            "is eps=1e-6 and was weight_decay=0.2, but the optimizer keeps the old ones, which are in its state"
        )
        with open_weights(tmp_path / "a" / "run.safetensors") as file:
            assert file.metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.2)"
    assert [(group["weight_decay"], group["eps"]) for group in groups_of(tmp_path / "a" / "run-state")] == [
        (0.2, 1e-8)
    ] * 2


def test_momentum_of_a_course_ends_with_it(said, tmp_path):
    said("a", lr_scheduler_type="OneCycleLR", optimizer_args="betas=.8,.99", max_train_steps=1)
    assert {group["betas"] for group in groups_of(tmp_path / "a" / "run-state")} != {(0.8, 0.99)}
    said("a", lr_scheduler="cosine", optimizer_args="betas=.8,.99", max_train_steps=3, resume="latest")
    assert {group["betas"] for group in groups_of(tmp_path / "a" / "run-state")} == {(0.8, 0.99)}
