"""library/training/published.py: what is shown of a schedule-free run, and that looking changes nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from library.options.optimizer import OptimizerOptions
from library.training.methods.base import Method, ParameterGroup
from library.training.optimization.optimizers import make_optimizer
from library.training.optimization.parts import Parts
from library.training.optimization.rounding import Rounding
from library.training.published import published_weights


class _Method:
    """Only what is asked of one here."""

    shown = False

    @contextlib.contextmanager
    def published_weights(self) -> Iterator[None]:
        self.shown = True
        yield
        self.shown = False


class _Run:
    """A few steps on random targets; `unused` never gets a gradient."""

    def __init__(self, optimizer: str, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.method: Method | _Method = _Method()
        self.trained = nn.ModuleDict({"used": nn.Linear(5, 7), "unused": nn.Linear(2, 2)}).to(dtype)
        self.optimizer = make_optimizer(
            OptimizerOptions(optimizer_type=optimizer), [ParameterGroup("all", list(self.trained.parameters()), 0.1)]
        )
        self.parts = Parts(self.optimizer, Rounding(0))

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.trained["used"](torch.randn(3, 5).to(self.trained["used"].weight)).square().mean().backward()
            self.parts.take(list(self.trained.parameters()), 0)
            self.parts.end()

    def look(self) -> contextlib.AbstractContextManager[None]:
        return published_weights(self.method, self.optimizer, self.trained)

    def everything(self) -> list[Any]:
        """Weights and the optimizer's state as plain values, bits included."""
        return [plain(self.trained.state_dict()), plain(self.optimizer.state_dict())]


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return (value.dtype, value.double().tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_looking_leaves_every_bit_of_a_schedule_free_run(steps, dtype):
    run = _Run("AdamWScheduleFree", dtype)
    run.go(steps)
    before = run.everything()
    with pytest.raises(KeyboardInterrupt), run.look():
        raise KeyboardInterrupt
    assert run.everything() == before


def test_shown_is_the_average():
    run = _Run("AdamWScheduleFree")
    run.go(3)
    weight = run.trained["used"].weight
    y, z = weight.detach().clone(), run.optimizer.state[weight]["z"]
    with run.look():
        assert run.method.shown
        assert torch.allclose(weight, (y - 0.1 * z) / 0.9)  # y = 0.9 x + 0.1 z
        assert not torch.allclose(weight, y)
        shown = weight.detach().clone()
        with run.look():  # a save within a preview
            assert weight.equal(shown)
        assert weight.equal(shown)
    assert not run.method.shown


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWScheduleFree"])
def test_a_run_with_looks_ends_as_one_without(optimizer):
    one, other = _Run(optimizer), _Run(optimizer)
    for run in (one, other):
        torch.manual_seed(2)
        for _ in range(4):
            run.go(2)
            with run.look() if run is one else contextlib.nullcontext():
                pass
    assert one.everything() == other.everything()


def test_other_optimizers_have_nothing_to_swap():
    run = _Run("AdamW")
    run.go(2)
    before = run.everything()
    with run.look():
        assert run.method.shown
        assert run.everything() == before
