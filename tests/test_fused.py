"""--fused_backward_pass and --fused_optimizer_groups: weights that move within the backward pass."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from library.training.device import engines
from library.training.methods.base import ParameterGroup
from library.training.optimization import parts
from library.training.optimization.fused import FusedStepper, divide_evenly
from library.training.optimization.parts import Parts
from tests.tiny import read_log, scalars, stored

PASS, GROUPS = {"fused_backward_pass": True}, {"fused_optimizer_groups": 5}
UNCLIPPED = {"max_grad_norm": 0, "save_state": True, "save_every_n_steps": 2}
FILES = ("run.safetensors", "run-state/objects.safetensors")


@pytest.fixture(scope="module")
def of_fine_tuning(pictures, tmp_path_factory) -> dict[str, object]:
    """The flags that make a run one of the U-Net and the text encoder themselves."""
    images = pictures / "1_sks shape"
    captions = {path.stem: {"caption": path.read_text(encoding="utf-8")} for path in images.glob("*.txt")}
    file = tmp_path_factory.mktemp("metadata") / "captions.json"
    file.write_text(json.dumps(captions), encoding="utf-8")
    return {
        "network_module": None,
        "caption_extension": None,
        "train_data_dir": images,
        "in_json": file,
        "train_text_encoder": True,
        "learning_rate": 1e-4,
    }


@pytest.fixture
def waiting(monkeypatch) -> list[int]:
    """So many values had gradients whenever a part was stepped."""
    counts, take = [], Parts.take

    def noted(self, *arguments):
        counts.append(sum(one.numel() for one in self.group_of if one.grad is not None))
        take(self, *arguments)

    monkeypatch.setattr(Parts, "take", noted)
    return counts


def assert_same(one: Path, other: Path) -> None:
    for name in FILES:
        assert stored(one / name) == stored(other / name), name


def test_an_unclipped_network_is_trained_as_without_it_and_goes_on_from_either_state(train, flags, tmp_path):
    """Schedule-free, whose groups count steps, and rehearsed."""
    changes = {**UNCLIPPED, "optimizer_type": "AdamWScheduleFree", "optimizer_args": "warmup_steps=3"}
    train(flags(tmp_path / "plain", **changes))
    train(flags(tmp_path / "pass", **changes, **PASS, no_rehearsal=None))
    assert_same(tmp_path / "pass", tmp_path / "plain")
    state = tmp_path / "plain" / "run-step00000002-state"
    train(flags(tmp_path / "groups", **changes, **GROUPS, resume=state))
    assert_same(tmp_path / "groups", tmp_path / "plain")


def test_an_unclipped_model_is_trained_as_without_it_with_fewer_gradients(
    train, flags, tmp_path, of_fine_tuning, waiting, capsys
):
    changes = {**UNCLIPPED, **of_fine_tuning, "gradient_checkpointing": True, "max_train_steps": 2}
    train(flags(tmp_path / "plain", **changes), script="fine_tune")
    assert not waiting
    most = {}
    for name, fused in (("pass", PASS), ("groups", GROUPS)):
        train(flags(tmp_path / name, **changes, **fused), script="fine_tune")
        assert_same(tmp_path / name, tmp_path / "plain")
        assert "unet: weights changed by" in capsys.readouterr().out
        most[name] = max(waiting)
        waiting.clear()
    values = sum(tensor.numel() for tensor in _trained(tmp_path / "plain"))
    embedding = 49408 * 64  # the largest
    assert most["pass"] == embedding
    assert embedding <= most["groups"] < values


def _trained(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "run-state" / "trained.safetensors").values())


def test_bf16_weights_move_one_by_one_as_all_at_once(train, flags, tmp_path, of_fine_tuning, monkeypatch):
    monkeypatch.setattr(parts, "_VALUES", 10**4)
    changes = {**UNCLIPPED, **of_fine_tuning, "mixed_precision": "bf16", "full_bf16": True, "max_train_steps": 2}
    train(flags(tmp_path / "plain", **changes, ema=True, no_rehearsal=None), script="fine_tune")
    train(flags(tmp_path / "pass", **changes, ema=True, **PASS), script="fine_tune")
    assert {tensor.dtype for tensor in _trained(tmp_path / "plain")} == {torch.bfloat16}
    assert_same(tmp_path / "pass", tmp_path / "plain")
    assert stored(tmp_path / "pass" / "run-ema.safetensors") == stored(tmp_path / "plain" / "run-ema.safetensors")


def test_each_weight_is_clipped_by_itself_and_the_norm_of_all_is_logged(train, flags, tmp_path, capsys):
    """Plain gradient descent, whose first step is as long as the clipped gradient."""
    changes = {"max_train_steps": 1, "optimizer_type": "AdamW", "max_grad_norm": 1e-3}
    moved, take = [], Parts.take

    def noted(self, parameters, step, factor=None):
        moved.extend(float((parameter.grad * factor).norm()) for parameter in parameters)
        take(self, parameters, step, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "take", noted)
        train(flags(tmp_path / "fused", **changes, **PASS, logging_dir=tmp_path / "fused logs"))
    said = capsys.readouterr().err
    assert said.count("--max_grad_norm 0.001 clips the gradients of each weight by their own norm") == 1
    train(flags(tmp_path / "plain", **changes, logging_dir=tmp_path / "plain logs"))
    norms = [scalars(read_log(tmp_path / f"{name} logs"), "gradient_norm")[1] for name in ("fused", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)
    assert sum(norm > 0.9e-3 for norm in moved) > 1


def test_a_set_that_lacks_a_gradient_moves_at_the_end():
    """And none is counted twice."""
    used, unused, apart = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([used, unused, apart], lr=1.0)

    class Prepared:
        param_groups = optimizer.param_groups

    Prepared.optimizer = optimizer
    Prepared.zero_grad = lambda self, set_to_none: optimizer.zero_grad(set_to_none)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    groups = [ParameterGroup("all", [used, unused, apart], 1.0)]
    stepper = FusedStepper(None, None, Prepared(), scheduler, groups, None, seed=0, sets=2)
    assert [len(members) for members in stepper.sets] == [2, 1]
    for number in (1, 2):
        (3 * used.sum() + 4 * apart.sum()).backward()
        assert used.eq(1 - 3 * (number - 1)).all()  # still to come
        assert apart.eq(1 - 4 * number).all()
        info = stepper.step()
        assert info.gradient_norm.item() == pytest.approx(50**0.5)
        assert used.eq(1 - 3 * number).all()
        assert unused.eq(1).all()
    assert all(parameter.grad is None for parameter in (used, unused, apart))


@pytest.mark.parametrize(("sets", "sizes"), [(1, [12]), (2, [8, 4]), (3, [4, 4, 4]), (5, [2, 2, 4, 2, 2]), (9, None)])
def test_sets_are_neighbours_of_about_equal_size(sets, sizes):
    parameters = [nn.Parameter(torch.empty(size)) for size in (1, 1, 2, 4, 2, 1, 1)]
    divided = divide_evenly(parameters, sets)
    assert [id(one) for members in divided for one in members] == [id(one) for one in parameters]
    assert [sum(one.numel() for one in members) for members in divided] == (sizes or [1, 1, 2, 4, 2, 1, 1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({**PASS, "gradient_accumulation_steps": 2}, "--fused_backward_pass keeps no gradients that further micro-"),
        ({**GROUPS, "mixed_precision": "fp16"}, "--fused_optimizer_groups moves weights before it is known whether"),
        ({**PASS, "optimizer_type": "Prodigy"}, "--fused_backward_pass: Prodigy is not known to treat every weight"),
    ],
    ids=["accumulation", "fp16", "Prodigy"],
)
def test_what_it_cannot_go_with_is_refused(changes, sentence, train, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **changes))
    assert f"error: {sentence}" in capsys.readouterr().err


def test_engines_that_spread_weights_are_refused(train, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "spreads", lambda accelerator: True)
    for changes in (PASS, {"full_bf16": True, "mixed_precision": "bf16"}, {"scale_weight_norms": 1}):
        with pytest.raises(SystemExit, match="2"):
            train(flags(tmp_path, **changes))
        assert f"error: --{next(iter(changes))} " in capsys.readouterr().err
