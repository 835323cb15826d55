"""Metrics of what flows through the units: Wanda and FLAP; labels are not read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depgraph import DependencyGraph, Group
from depgraph.coupling.groups import Member
from pruners.registry import Batch
from pruners.statistics.calls import Call, Watch, run
from pruners.statistics.gradient import evaluating
from pruners.statistics.units import reduce_others, sum_over_members


@dataclass
class _Inputs:
    """Of what a layer reads, by channel: sums of values and of squares, and over how many."""

    total: Tensor
    squares: Tensor
    count: int

    def beside(self, weight: Tensor) -> _Inputs:
        """What each number of a weight multiplies: shaped to broadcast against (out, in, ...)."""
        groups = len(self.total) // weight.shape[1]  # of a grouped convolution; else 1

        def spread(values: Tensor) -> Tensor:
            each = values.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
            return each.reshape(*each.shape, *[1] * (weight.dim() - 2))

        return _Inputs(spread(self.total), spread(self.squares), self.count)

    @property
    def mean_square(self) -> Tensor:
        return self.squares / self.count

    @property
    def variance(self) -> Tensor:
        return (self.mean_square - (self.total / self.count).square()).clamp_min(0)


@torch.no_grad()
def input_statistics(
    model: nn.Module, weights: set[str], batches: Sequence[Batch]
) -> dict[str, _Inputs]:
    """What each linear layer and convolution reads, over all places of all samples.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode; stays as it is.
    weights : set of str
        Those that no layer is called with are left out of the result.
    batches : sequence of (inputs, targets)

    Returns
    -------
    dict of str to statistics
        In float64, one entry for each input channel; a layer that is applied several times has
        them over all its applications.
    """
    found: dict[str, _Inputs] = {}

    def after(call: Call, output: Tensor) -> Tensor:
        spatial = 0 if call.convolution is None else call.parameter.dim() - 2
        rows = call.inputs.movedim(-1 - spatial, -1).flatten(0, -2).double()
        known = found.get(call.weight, _Inputs(rows.new_zeros(()), rows.new_zeros(()), 0))
        found[call.weight] = _Inputs(
            known.total + rows.sum(0),
            known.squares + rows.square().sum(0),
            known.count + len(rows),
        )
        return output

    with evaluating(model), Watch(model, weights, after):
        for inputs, _ in batches:
            run(model, inputs)
    return found


class _Activation(ABC):
    """What both share: which members of a group count, and what they read."""

    @abstractmethod
    def elements(self, weight: Tensor, inputs: _Inputs) -> Tensor:
        """A score for every number of a weight; the inputs broadcast against it."""

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One score per unit."""
        names = {member.parameter for group in graph.prunable for member in group.members}
        seen = input_statistics(model, names, batches)
        weights = dict(model.named_parameters())

        def reduction(name: str, dim: int) -> Tensor:
            weight = weights[name].detach().double()
            if name not in seen:
                return reduce_others(weight.abs(), dim)
            return reduce_others(self.elements(weight, seen[name].beside(weight)), dim)

        def members(group: Group) -> Sequence[Member]:
            reading = [m for m in group.members if m.dim == 1 and m.parameter in seen]
            writing = [m for m in group.members if m.dim == 0 and m.parameter in seen]
            return reading or writing or group.members

        return sum_over_members(graph, reduction, members)


class Wanda(_Activation):
    """Absolute weights times the norm of what they multiply, over the layers that read a unit.

    ``sum of |W_ij| |x_j|``, ``|x_j|`` the root mean square of input j over all places of all
    samples. Of a group that no linear layer or convolution reads, those that write it count, with
    the norms of their own inputs; where there are none either (embeddings only), ``|w|``.

    References
    ----------
    Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, eq. 1, summed over a unit's columns; a mean in place of the sum over places.
    """

    name = "wanda"
    needs_data = True

    def elements(self, weight: Tensor, inputs: _Inputs) -> Tensor:
        """``|W| |x|``."""
        return weight.abs() * inputs.mean_square.sqrt()


class Variance(_Activation):
    """Variance of a unit's activation over all places of all samples, whatever reads it.

    Other groups as for `Wanda`.

    References
    ----------
    Berisha, Mehnert, Condurache: "Variance-Based Pruning for Accelerating and Compressing Trained
    Networks", ICCV 2025, for hidden units; see `PRESETS` for the shift of means that goes with it.
    """

    name = "variance"
    needs_data = True

    def elements(self, weight: Tensor, inputs: _Inputs) -> Tensor:
        """``var(x)`` shared out to the numbers that it multiplies."""
        each = weight.numel() / weight.shape[1]
        return (inputs.variance / each).expand_as(weight)


class FLAP(_Activation):
    """Variance of a unit's activation times the squared norm of the weights that read it.

    ``sum of var(x_j) W_ij^2``: what is lost when the unit is replaced by its mean, as the
    compensation does with the biases. Other groups as for `Wanda`. Scores are ranked together after
    each group's mean is subtracted and its standard deviation divided by.

    References
    ----------
    An, Zhao, Yu, Tang, Wang: "Fluctuation-based Adaptive Structured Pruning for Large Language
    Models", AAAI 2024, the weighted input feature variance.
    """

    name = "flap"
    needs_data = True
    normalise = "spread"

    def elements(self, weight: Tensor, inputs: _Inputs) -> Tensor:
        """``W^2 var(x)``."""
        return weight.square() * inputs.variance
