"""The learning rates that optimizers of all kinds move weights with, as the log has them."""

import pytest
import torch

from library.training.optimization.optimizers import effective_rates
from tests.quadratic import optimizer_of, options, step, weights


def test_rates_are_those_that_weights_are_moved_with():
    parameters = weights()
    prodigy = optimizer_of(parameters, options("Prodigy"))
    assert effective_rates(prodigy, [1.0, 1.0]) == [1e-6, 1e-6]
    step(parameters, prodigy, range(20))
    (rate, other), d = effective_rates(prodigy, [0.5, 0.0]), prodigy.param_groups[0]["d"]
    assert (rate, other) == (0.5 * d, 0)
    assert d > 1e-6

    free = optimizer_of(parameters, options("AdamWScheduleFree", "warmup_steps=4"))
    shown = []
    for number in range(6):
        shown.append(effective_rates(free, [0.01, 0.01])[0])
        step(parameters, free, range(number, number + 1))
        assert shown[-1] == pytest.approx(free.param_groups[0]["scheduled_lr"])
    assert shown[3:] == [0.01] * 3
    assert effective_rates(optimizer_of(parameters, options("AdamW")), [0.1, 0.2]) == [0.1, 0.2]


@pytest.mark.parametrize("silent", [True, False])
def test_rates_of_a_rectified_schedule_free_run(silent):
    parameters = weights()
    free = optimizer_of(parameters, options("RAdamScheduleFree", "betas=.9,.9", f"silent_sgd_phase={silent}"))
    for number in range(12):
        (rate, _) = effective_rates(free, [0.01, 0.01])
        step(parameters, free, range(number, number + 1))
        assert rate == pytest.approx(free.param_groups[0]["scheduled_lr"])


@pytest.mark.parametrize("arguments", [(), ("warmup_init=True",)])
def test_rates_of_adafactor_are_its_relative_steps(arguments):
    parameters = weights()
    optimizer = optimizer_of(parameters, options("AdaFactor", "scale_parameter=False", *arguments), (1.0, 0.0))
    for number in range(3):
        rates = effective_rates(optimizer, [1.0, 0.0])
        step(parameters, optimizer, range(number, number + 1))
        assert rates == [optimizer._get_lr(optimizer.param_groups[0], optimizer.state[parameters[0]]), 0]


def test_sgd_with_d_adaptation_divides_its_rate_by_the_first_gradient():
    parameters = weights()
    optimizer = optimizer_of(parameters, options("DAdaptSGD"), (1.0, 0.5))
    step(parameters, optimizer, range(3))
    before = [one.detach().clone() for one in parameters]
    s = [optimizer.state[one]["s"].clone() for one in parameters]
    rates = effective_rates(optimizer, [1.0, 0.5])
    step(parameters, optimizer, range(3, 4))
    for one, old, rate in ((0, s[0], rates[0]), (2, s[2], rates[1])):
        grown = optimizer.state[parameters[one]]["s"] - old
        assert torch.allclose(grown, parameters[one].grad * rate)
        assert not torch.equal(parameters[one], before[one])
