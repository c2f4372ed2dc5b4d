"""library/training/optimization/rounding.py: rounding is right on average; only then do small steps add up."""

import pytest
import torch

from library.training.optimization.rounding import Rounding, rounded

KINDS = [torch.bfloat16, torch.float16]
INF = float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of this type at or next to each value, the one below first, float64."""
    near = values.to(dtype)
    exact = near.double() == values.double()
    beyond = torch.where(near.double() < values.double(), INF, -INF).to(dtype)
    other = torch.where(exact, near, torch.nextafter(near, beyond))
    low, high = torch.stack([near.double(), other.double()]).sort(dim=0).values
    return low, high


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """Both signs, all exponents of the type, its subnormals included."""
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    subnormal = torch.tensor([0.3, 0.01, 0.003]) * smallest
    normal = torch.tensor([1.0003, 0.0201, 3.14159, 0.99999, 1.503 * smallest, 1.0001 * smallest, 0.4321 * largest])
    values = torch.cat([subnormal, normal, torch.randn(20, generator=generator())])
    return torch.cat([values, -values])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_mean_is_the_value(dtype):
    values, count = values_of(dtype), 20000
    drawn = rounded(values.repeat(count, 1), dtype, generator()).double()
    low, high = neighbours(values, dtype)
    assert ((drawn == low) | (drawn == high)).all()
    exact, distance = values.double(), high - low
    assert (distance > 0).all()
    chance = (exact - low) / distance
    deviation = (chance * (1 - chance) / count).sqrt() + 1 / count
    assert (((drawn.mean(dim=0) - exact) / distance).abs() < 5 * deviation).all()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_what_the_type_has_stays(dtype):
    """All of its 65536 numbers."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    after = rounded(values.float(), dtype, generator())
    assert after.isnan().equal(values.isnan())
    assert after[~values.isnan()].equal(values[~values.isnan()])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_only_what_is_too_large_for_plain_rounding_becomes_infinite(dtype):
    largest = torch.finfo(dtype).max
    step = largest - neighbours(torch.tensor(largest * 0.999), dtype)[0].item()
    values = torch.tensor([largest + 0.4 * step * torch.finfo(dtype).eps, largest * (1 + torch.finfo(dtype).eps)])
    values = torch.cat([values, -values])
    drawn = rounded(values.repeat(1000, 1), dtype, generator())
    plain = values.to(dtype)
    assert plain.isfinite().tolist() == [True, False, True, False]
    assert (drawn == plain).all()


def test_where_it_happens_is_its_address():
    exact, rounding = torch.randn(500, generator=generator()), Rounding(1)

    def draw(rounding: Rounding, step: int, parameter: int) -> torch.Tensor:
        target = torch.empty(500, dtype=torch.bfloat16)
        rounding(target, exact, step, parameter)
        return target

    first = draw(rounding, 3, 7)
    others = [draw(Rounding(2), 3, 7), draw(rounding, 4, 7), draw(rounding, 3, 8)]
    assert not any(other.equal(first) for other in others)
    assert draw(Rounding(1), 3, 7).equal(first)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_small_steps_add_up_where_plain_rounding_stalls(dtype):
    start, step, count = torch.ones(2000), torch.finfo(dtype).eps / 50, 500
    stochastic, plain, rounding = start.to(dtype), start.to(dtype), Rounding(0)
    for number in range(count):
        rounding(stochastic, stochastic.float() + step, number, 0)
        plain = (plain.float() + step).to(dtype)
    assert plain.eq(1).all()
    expected = 1 + count * step
    assert stochastic.float().mean().item() == pytest.approx(expected, abs=0.02 * count * step)
