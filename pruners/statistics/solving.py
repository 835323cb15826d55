"""Linear systems of second moments, which hold whatever the samples were: damped until they do."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_moments(matrix: Tensor, right: Tensor, damping: float | Tensor) -> Tensor:
    """``(A + d I)^-1 B`` for a symmetric A that is positive semidefinite up to rounding.

    Parameters
    ----------
    matrix, right : Tensor (n, n), (n, m)
        Finite.
    damping : float
        What is added to the diagonal; ten times as much as often as it takes. Positive.

    Returns
    -------
    Tensor (n, m)

    Examples
    --------
    >>> solve_moments(torch.zeros(2, 2), torch.zeros(2, 1), 1e-30).flatten().tolist()
    [0.0, 0.0]
    """
    return torch.cholesky_solve(right, damped_factor(matrix, damping))


def damped_factor(matrix: Tensor, damping: float | Tensor) -> Tensor:
    """The Cholesky factor of a matrix as `solve_moments` damps it."""
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return factor
        damping = damping * 10


def roots(matrix: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive semidefinite matrices, and their inverses.

    Parameters
    ----------
    matrix : Tensor (..., n, n)
        Finite. Without a positive eigenvalue it says nothing, and counts as the identity.
    ridge : float
        Share of the mean eigenvalue that is added to each; with 0 there may be no inverse.

    Returns
    -------
    root, inverse : Tensor (..., n, n)
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    mean = values.mean(-1, keepdim=True)
    values = torch.where(mean > TINY, values + ridge * mean, 1.0).sqrt()
    return (vectors * values[..., None, :]) @ vectors.mT, (
        vectors / values[..., None, :]
    ) @ vectors.mT


TINY = 1e-60
"""A mean eigenvalue that stands for nothing; products of float32 numbers are larger."""
