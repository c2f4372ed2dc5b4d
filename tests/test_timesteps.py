"""Which timesteps are drawn, by each --timestep_distribution, and what their losses are multiplied with."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies

from library.models.noise import DDPM
from library.options.objective import ObjectiveOptions
from library.training.timesteps import LogitNormal, LossAware, Timesteps, timesteps_for


@settings(max_examples=60, deadline=None)
@given(
    low=strategies.integers(0, 999),
    size=strategies.integers(1, 1000),
    distribution=strategies.sampled_from(["uniform", "logit_normal", "loss_aware"]),
    mean=strategies.floats(-50, 50),
    learned=strategies.booleans(),
)
def test_timesteps_are_within_their_bounds(low, size, distribution, mean, learned):
    high = min(low + size, 1000)
    options = ObjectiveOptions(
        min_timestep=low, max_timestep=high, timestep_distribution=distribution, logit_mean=mean, logit_std=9.0
    )
    timesteps = timesteps_for(options, DDPM())
    if distribution == "loss_aware" and learned:
        teach(timesteps, lambda t: 1.0 + t)
    drawn = timesteps.draw(range(30))
    assert drawn.dtype == torch.int64
    assert low <= drawn.min()
    assert drawn.max() < high
    importance = timesteps.importance(drawn)
    assert importance is None or torch.isfinite(importance).all()


def test_uniform_timesteps_are_those_of_the_process():
    assert torch.equal(timesteps_for(ObjectiveOptions(), DDPM()).draw(range(9)), DDPM().sample_timesteps(range(9)))


def test_logit_normal_timesteps_have_their_median_at_the_mean():
    for mean, deviation in ((0.0, 1.0), (1.0, 0.5)):
        drawn = LogitNormal(DDPM(), 200, 1000, mean, deviation).draw(range(2000)).double()
        places = (drawn + 0.5 - 200) / 800
        logits = torch.log(places / (1 - places))
        assert logits.median().item() == pytest.approx(mean, abs=0.1)
        assert logits.std().item() == pytest.approx(deviation, rel=0.1)


def teach(timesteps: LossAware, loss_of: Callable[[int], float], rounds: int = 12) -> None:
    """Losses of every bin, one after the other."""
    every = torch.tensor(timesteps.edges[:-1])
    losses = torch.tensor([loss_of(t) for t in every.tolist()])
    for _ in range(rounds):
        timesteps.weigh(losses, every, torch.ones(len(every), dtype=torch.bool))
        timesteps.learn(lambda values: values)


def test_until_every_bin_was_met_loss_aware_timesteps_are_uniform():
    timesteps = LossAware(DDPM(), 0, 1000)
    plain = Timesteps(DDPM(), 0, 1000).draw(range(50))
    teach(timesteps, lambda t: 1.0 + t, rounds=10)  # of which the last is not read yet
    assert torch.equal(timesteps.draw(range(50)), plain)
    assert timesteps.importance(plain) is None
    teach(timesteps, lambda t: 1.0 + t, rounds=1)
    assert not torch.equal(timesteps.draw(range(50)), plain)


def test_loss_aware_timesteps_are_where_losses_are_large_and_their_mean_is_the_uniform_one():
    """Nichol and Dhariwal 2021, eq. 18: p is proportional to the root of the mean square, and weights are 1 / (n p)."""
    timesteps = LossAware(DDPM(), 0, 1000)
    teach(timesteps, lambda t: 3.0 if t < 100 else 1.0)
    drawn = timesteps.draw(range(4000))
    early = 0.9 * (2 * 3) / (2 * 3 + 18) + 0.1 * 0.1
    assert (drawn < 100).float().mean().item() == pytest.approx(early, abs=0.02)
    importance = timesteps.importance(drawn)
    assert importance[drawn < 100].unique().item() == pytest.approx(0.1 / early, rel=1e-6)
    assert importance[drawn >= 100].unique().item() == pytest.approx(0.9 / (1 - early), rel=1e-6)
    for loss in (drawn.float(), (drawn < 100).float()):
        uniform = 499.5 if loss.max() > 1 else 0.1
        assert (importance * loss).mean().item() == pytest.approx(uniform, rel=0.05)


def test_weights_are_in_the_losses_and_not_in_what_is_learned():
    timesteps = LossAware(DDPM(), 0, 1000)
    teach(timesteps, lambda t: 3.0 if t < 100 else 1.0)
    losses = torch.tensor([2.0, 2.0], requires_grad=True)
    at = torch.tensor([0, 999])
    weighed = timesteps.weigh(losses, at, torch.tensor([True, True]))
    torch.testing.assert_close(weighed, 2 * timesteps.importance(at))
    assert timesteps.values[:, [0, -1]].tolist() == [[4, 4], [1, 1]]
    weighed.sum().backward()
    torch.testing.assert_close(losses.grad, timesteps.importance(at))


def test_no_loss_is_so_small_that_its_timesteps_are_never_drawn():
    timesteps = LossAware(DDPM(), 0, 1000)
    teach(timesteps, lambda t: float(t == 0))
    assert timesteps.importance(torch.arange(1000)).max().item() == pytest.approx(10)
    nothing = LossAware(DDPM(), 0, 1000)
    teach(nothing, lambda t: 0.0)
    assert nothing.importance(torch.arange(1000)) is None


def test_what_does_not_train_is_not_learned_from():
    timesteps = LossAware(DDPM(), 0, 1000)
    losses = torch.tensor([1.0, math.nan, 5.0])
    timesteps.weigh(losses, torch.tensor([0, 0, 0]), torch.tensor([True, True, False]))
    assert timesteps.values.sum(dim=1).tolist() == [1, 1]
    timesteps.forget()
    assert timesteps.values is None


def test_older_losses_count_less_and_none_are_needed_of_a_bin():
    timesteps = LossAware(DDPM(), 0, 1000)
    teach(timesteps, lambda t: 10.0)
    teach(timesteps, lambda t: 1.0, rounds=60)
    squares = timesteps.squares / timesteps.numbers
    assert squares.tolist() == pytest.approx([1] * 20, rel=0.3)
    timesteps.weigh(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([True]))
    for _ in range(2):
        timesteps.values = torch.zeros(2, 20) if timesteps.values is None else timesteps.values
        timesteps.learn(lambda values: values)
    assert timesteps.seen.tolist() == [73, *[72] * 19]


def test_the_state_holds_what_is_still_on_its_way_and_only_fits_its_bounds(fresh_console, capsys):
    one, other = LossAware(DDPM(), 0, 1000), LossAware(DDPM(), 0, 1000)
    teach(one, lambda t: 1.0 + t)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.state_dict() == other.state_dict()
    for timesteps in (one, other):
        teach(timesteps, lambda t: 2.0)
    assert one.state_dict() == other.state_dict()
    narrow = LossAware(DDPM(), 0, 500)
    narrow.load_state_dict(one.state_dict())
    assert narrow.seen.sum() == 0
    assert "is learned anew" in capsys.readouterr().err
