"""Least squares of one layer from sums over batches: memory does not grow with the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from pruners.statistics.finite import check_seen
from pruners.statistics.solving import solve_moments

ROUNDING = 1e-9
"""Share of the mean square of the inputs below which their spread is taken for rounding."""

ROWS = 1 << 13
"""Places whose products are added up in float32, before they go to the sum in float64."""


class Fit:
    """Inputs of a layer and the outputs that are wanted of it, summed up.

    Both are taken relative to the means of the first batch, so that products in float32 have the
    size of the spread, and what is subtracted in the end for the means of all is small.

    Parameters
    ----------
    name : str
        Of the weight, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in more places.

        Parameters
        ----------
        x, y : Tensor (places, in), (places, out)
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(exact), y.to(exact)
        if not self.count:
            self._begin(x, y)
        for rows, wanted in zip(x.split(ROWS), y.split(ROWS), strict=True):
            rows, wanted = rows - self.origin_x, wanted - self.origin_y
            self.moment += rows.T @ rows
            self.cross += rows.T @ wanted
            self.sum_x += rows.sum(0, dtype=torch.float64)
            self.sum_y += wanted.sum(0, dtype=torch.float64)
        self.count += len(x)

    def _begin(self, x: Tensor, y: Tensor) -> None:
        zeros = x.new_zeros
        width, outputs = x.shape[1], y.shape[1]
        self.origin_x, self.origin_y = x.mean(0), y.mean(0)
        self.moment = zeros(width, width, dtype=torch.float64)
        self.cross = zeros(width, outputs, dtype=torch.float64)
        self.sum_x = zeros(width, dtype=torch.float64)
        self.sum_y = zeros(outputs, dtype=torch.float64)

    def shift(self, weight: Tensor) -> Tensor:
        """The bias with which the means of the outputs are those of y, the weight as it is."""
        off_x, off_y = self.sum_x / self.count, self.sum_y / self.count
        mean_x, mean_y = self.origin_x.double() + off_x, self.origin_y.double() + off_y
        check_seen(self.name, mean_x, mean_y)
        return mean_y - weight.double() @ mean_x

    def solve(
        self, weight: Tensor, bias: Tensor | None, damping: float
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias nearest to the given ones that make of x nearly y.

        Parameters
        ----------
        weight : Tensor (out, in)
        bias : Tensor (out,) or None
            None: the layer has none, and gets none.
        damping : float
            See `refitting.compensation.compensate`.

        Returns
        -------
        weight, bias : Tensor
            In float64.

        Raises
        ------
        DepgraphError
            When inputs or outputs are not finite, or their squares are not.
        """
        check_seen(self.name, self.moment, self.cross)
        off_x, off_y = self.sum_x / self.count, self.sum_y / self.count
        mean_x, mean_y = self.origin_x.double() + off_x, self.origin_y.double() + off_y
        moment = self.moment - self.count * torch.outer(off_x, off_x)
        cross = self.cross - self.count * torch.outer(off_x, off_y)
        size = moment.diagonal().mean().clamp_min(0) + self.count * mean_x.square().mean()
        if bias is None:
            moment += self.count * torch.outer(mean_x, mean_x)
            cross += self.count * torch.outer(mean_x, mean_y)
        weight = weight.double()
        spread = moment.diagonal().mean().clamp_min(0)
        ridge = damping * spread + (ROUNDING * size).clamp_min(1e-30)
        weight = weight + solve_moments(moment, cross - moment @ weight.T, ridge).T
        return weight, None if bias is None else mean_y - weight @ mean_x
