"""Singular values of changes of weights, without ever building a full matrix where two factors tell the same."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.lora.changes import Factors

_OVERSAMPLING = 8  # directions a block has more than the rank
_BLOCKS = 6  # from the rank on at which so many blocks fill the matrix, looking at all directions is as fast
_MOST_BLOCKS = 16
_LITTLE = 0.015  # share of the squared error that further blocks may be expected to take away
_CANCELLED = 1e-3  # share of the squared norm below which the error is not found by subtracting
_ASKEW = 1e-4  # cosine of two directions that should be at right angles
_ROUNDING = 1e-11  # share of the squared norm that is nothing but the rounding of float32


class SVD(NamedTuple):
    """u (m, k) @ diag(s) (k,) @ vh (k, n); `s` falls."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def first(self, rank: int) -> "SVD":
        """The part of the `rank` largest values."""
        return SVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])

    def truncated(self, rank: int) -> Factors:
        """The best approximation of this rank (Eckart and Young 1936), singular values in `up`."""
        return Factors(self.u[:, :rank] * self.s[:rank], self.vh[:rank])


def svd_of_product(factors: Factors) -> SVD:
    """The full decomposition of up @ down, through QR of both factors: the core that is decomposed is rank x rank."""
    up_basis, up_core = torch.linalg.qr(factors.up)
    down_basis, down_core = torch.linalg.qr(factors.down.T)
    u, s, vh = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    return SVD(up_basis @ u, s, vh @ down_basis.T)


def largest_svd(matrix: Tensor, rank: int, *, exact: bool = False) -> SVD:
    """The `rank` largest singular values of a matrix (m, n) in float32 and their vectors; all there are, if fewer.

    Without `exact` by a randomised block Krylov iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, section
    4.5; Musco and Musco 2015, arXiv:1504.05477), which stops when further blocks of directions would take less than
    1.5 % off the squared error, if gains go on as the last two of them. The error |A - A_rank| (Frobenius) is then at
    most 1.01 times the smallest that this rank allows, or three millionths of |A| where that is more. The sketch is
    random, so no theorem says so of every matrix: the tests hold it against spectra of many kinds, of which flat ones
    and those with steps come closest. Where the rank is a large share of the matrix, or the iteration does not come to
    an end, all directions are looked at: through the eigenvectors of A^T A, or where these tell too little of small
    values, as with `exact`, the full decomposition.
    The same matrix gives the same result: the sketch depends on its shape alone.
    """
    if len(matrix) < matrix.shape[1]:  # LAPACK takes twice the time for these
        u, s, vh = largest_svd(matrix.T, rank, exact=exact)
        return SVD(vh.T, s, u.T)
    found = None
    if not exact and (rank + _OVERSAMPLING) * _BLOCKS <= matrix.shape[1]:
        found = _krylov_svd(matrix, rank)
    if not exact and found is None:
        found = _gram_svd(matrix, rank)
    return found or SVD(*torch.linalg.svd(matrix, full_matrices=False)).first(rank)


def squared_error(matrix: Tensor, factors: Factors) -> float:
    """|matrix - up @ down|^2 (Frobenius), without ever holding the product."""
    rows = max(1, 2**20 // matrix.shape[1])
    parts = zip(matrix.split(rows), factors.up.split(rows), strict=True)
    return sum(squared_norm(torch.addmm(part, up, factors.down, alpha=-1)) for part, up in parts)


def _krylov_svd(matrix: Tensor, rank: int) -> SVD | None:
    """See `largest_svd`, for (m, n) with m >= n; None if it does not converge."""
    height, width = matrix.shape
    block_width = rank + _OVERSAMPLING
    generator = torch.Generator().manual_seed(height << 32 | width)
    directions = torch.randn(height, block_width, generator=generator).to(matrix.device)
    basis, images = matrix.new_empty(width, 0), matrix.new_empty(height, 0)  # images: matrix @ basis
    gram = matrix.new_empty(0, 0)  # images^T @ images
    total, errors = squared_norm(matrix), []
    for _ in range(min(_MOST_BLOCKS, width // block_width)):
        block = _orthonormal(matrix.T @ directions, basis)
        image = matrix @ block
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        products = images.T @ image
        gram = torch.cat([torch.cat([gram, products[: len(gram)].T]), products], 1)
        squares, vectors = torch.linalg.eigh(gram)
        error = total - squares[-rank:].sum(dtype=torch.float64).item()
        if error <= _CANCELLED * total:
            found = _svd_within(basis, images).first(rank)
            error = squared_error(matrix, found.truncated(rank))
            if error <= _ROUNDING * total or _still_to_gain([*errors, error]) <= _LITTLE * error:
                return found
        elif _still_to_gain([*errors, error]) <= _LITTLE * error:
            largest = vectors[:, -rank:]
            return _svd_within(basis @ largest, images @ largest)
        errors.append(error)
        directions = image
    return None


def _still_to_gain(errors: Sequence[float]) -> float:
    """What further blocks will take off the last of these falling errors, if gains go on as the last two of them: as a
    geometric series.
    """
    if len(errors) < 3:
        return math.inf
    before, last = errors[-3] - errors[-2], errors[-2] - errors[-1]
    if last <= 0:
        return 0.0
    return last * last / (before - last) if last < before else math.inf


def _gram_svd(matrix: Tensor, rank: int) -> SVD | None:
    """From the eigenvectors of matrix^T @ matrix; None where the error is too small to trust them."""
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    total = squared_norm(matrix)
    if total - squares[-rank:].sum(dtype=torch.float64).item() <= _CANCELLED * total:
        return None
    largest = vectors[:, -rank:]
    return _svd_within(largest, matrix @ largest)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """As many orthonormal columns, orthogonal to an orthonormal `basis`, that hold what `block` adds to it."""
    added = block
    for _ in range(2):  # what the first projection leaves may be little more than rounding, of any direction
        added = torch.linalg.qr(added - basis @ (basis.T @ added)).Q
        askew = basis.T @ added
        if not askew.numel() or askew.abs().max() <= _ASKEW:  # so little that taking it away leaves them orthonormal
            return added - basis @ askew
    return torch.linalg.qr(torch.cat([basis, block], 1)).Q[:, basis.shape[1] :]  # nothing added: reflections find some


def _svd_within(basis: Tensor, images: Tensor) -> SVD:
    """The decomposition of images @ basis^T, with orthonormal columns in `basis`."""
    q, r = torch.linalg.qr(images)
    u, s, vh = torch.linalg.svd(r)
    return SVD(q @ u, s, vh @ basis.T)


def squared_norm(matrix: Tensor) -> float:
    """|matrix|^2 (Frobenius) of a float32 matrix, to seven digits however large it is."""
    along = 0 if matrix.stride(0) == 1 else 1  # many times faster than across the memory
    return torch.linalg.vector_norm(matrix, dim=along).double().square().sum().item()


def beside(parts: list[Factors]) -> Factors:
    """Factors of the sum of several products."""
    return Factors(torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts]))
