"""Singular values of large matrices at low rank, against the full decomposition in float64."""

from functools import cache

import pytest
import torch
from torch import Tensor

from library.lora.changes import Factors
from library.lora.decomposition import largest_svd, squared_error, svd_of_product

ROUNDING = 3e-6
SHAPES = ((300, 260, 16), (96, 640, 4), (640, 200, 25), (120, 120, 1), (150, 200, 40))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with these singular values and directions of no kind."""
    left, right = (torch.linalg.qr(random(size, len(values), seed=size))[0] for size in (rows, columns))
    return (left * values) @ right.T


@cache
def matrix(kind: str, rows: int, columns: int, rank: int) -> Tensor:
    count = min(rows, columns)
    number = torch.arange(1, count + 1)
    noise = random(rows, columns)
    if kind == "flat":
        return noise
    if kind == "low rank and noise":
        return noise + 1.5 * random(rows, rank, seed=1) @ random(rank, columns, seed=2) / max(rows, columns) ** 0.5
    if kind == "single entries":
        places = torch.arange(3 * rank + 20)
        empty = torch.zeros(rows, columns)
        empty[places * 7 % rows, places * 11 % columns] = random(len(places))
        return empty
    if kind == "heavy tails":
        return noise * random(rows, columns, seed=1).abs() ** 3
    values = {
        "like 1/i": 1 / number,
        "like 1/sqrt(i)": number**-0.5,
        "like sqrt(1 - i/n)": (1 - number / (count + 1)).sqrt(),
        "exponential": torch.exp(-number / rank),
        "steep": torch.exp(-number * 12 / rank),
        "all equal": torch.ones(count),
        "clusters": 10 ** (-0.2 * (number // (rank // 2 + 2))),
        "a small step": torch.where(number <= rank, 1.0, 0.9),
        "a large step behind": torch.where(number <= 2 * rank, 1.0, 0.1),
        "two steps": torch.where(number <= rank, 1.1, torch.where(number <= 2 * (rank + 8), 1.0, 0.02)),
        "a few are large": torch.where(number <= rank // 2, 1e4, (1 - number / (count + 1)).sqrt()),
    }
    return of_values(values[kind], rows, columns)


KINDS = (
    *("flat", "low rank and noise", "single entries", "heavy tails", "like 1/i", "like 1/sqrt(i)"),
    *("like sqrt(1 - i/n)", "exponential", "steep", "all equal", "clusters", "a small step", "a large step behind"),
    *("two steps", "a few are large"),
)


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_within_one_percent_of_the_best_error(kind, rows, columns, rank):
    whole = matrix(kind, rows, columns, rank)
    found = largest_svd(whole, rank)
    assert [tuple(part.shape) for part in found] == [(rows, rank), (rank,), (rank, columns)]
    error = (whole.double() - (found.u.double() * found.s.double()) @ found.vh.double()).norm()
    best = torch.linalg.svdvals(whole.double())[rank:].norm()
    assert error <= 1.01 * best + ROUNDING * whole.norm()
    for directions in (found.u.T, found.vh):
        torch.testing.assert_close(directions @ directions.T, torch.eye(rank), rtol=0, atol=1e-5)
    assert torch.equal(found.s, found.s.sort(descending=True).values)


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
@pytest.mark.parametrize("share", [1, 0.5, 0])
def test_matrices_of_no_higher_rank_come_back(rows, columns, rank, share):
    true_rank = int(rank * share)
    whole = random(rows, true_rank, seed=1) @ random(true_rank, columns, seed=2)
    up, down = largest_svd(whole, rank).truncated(rank)
    assert (whole - up @ down).norm() <= ROUNDING * whole.norm()


def test_no_large_matrix_is_decomposed(monkeypatch):
    """But where `exact` asks for it, or the rank is a large share."""
    sizes, full = [], torch.linalg.svd

    def svd(matrix: Tensor, **arguments: object) -> object:
        sizes.append(min(matrix.shape))
        return full(matrix, **arguments)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    whole = matrix("flat", 300, 260, 16)
    largest_svd(whole, 16)
    assert max(sizes) <= 16
    exact = largest_svd(whole, 16, exact=True)
    assert sizes[-1] == 260
    torch.testing.assert_close(exact.s, torch.linalg.svdvals(whole)[:16], rtol=1e-5, atol=0)
    best = torch.linalg.svdvals(whole.double())[200:].norm()
    assert abs(squared_error(whole, largest_svd(whole, 200).truncated(200)) ** 0.5 / best - 1) < 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (1, 7), (5, 5)])
def test_ranks_above_what_a_small_matrix_has(rows, columns):
    whole = random(rows, columns)
    found = largest_svd(whole, 8)
    assert len(found.s) == min(rows, columns)
    torch.testing.assert_close(torch.matmul(*found.truncated(8)), whole)


def test_a_matrix_is_always_decomposed_alike_and_draws_nothing():
    whole, state = matrix("flat", 300, 260, 16), torch.random.get_rng_state()
    first = largest_svd(whole, 16)
    torch.manual_seed(5)
    assert all(map(torch.equal, first, largest_svd(whole.clone(), 16)))
    torch.random.set_rng_state(state)
    largest_svd(whole, 16)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_products_are_decomposed_from_their_factors():
    factors = Factors(random(50, 6, seed=1), random(6, 40, seed=2))
    found = svd_of_product(factors)
    product = factors.up.double() @ factors.down.double()
    torch.testing.assert_close(found.s.double(), torch.linalg.svdvals(product)[:6], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.matmul(*found.truncated(6)).double(), product, rtol=0, atol=1e-4)


def test_squared_error_of_more_rows_than_are_taken_at_once():
    whole, factors = random(3000, 500), Factors(random(3000, 2, seed=1), random(2, 500, seed=2))
    expected = (whole.double() - factors.up.double() @ factors.down.double()).square().sum()
    assert abs(squared_error(whole, factors) / expected - 1) < 1e-5
