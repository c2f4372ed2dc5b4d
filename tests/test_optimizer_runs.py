"""Every optimizer trains the tiny model, goes on where it was stopped, and logs its rates."""

import pytest

from library.options.optimizer import OPTIMIZERS
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
