"""What ops take within a model, against alone: a factor for each kind, from whole models timed.

Alone, an op's buffers are where the last call left them and its threads are awake. In a model its
memory may be fresh and its operands out of the cache, so that it takes longer; how much depends on
the device and on the kind of op, little on its size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from depgraph import DependencyGraph

Times = Mapping[str, float]
"""Milliseconds of each kind of op."""

NOISE = 0.02
"""How far off the time of a whole model is, as a part of it: standard deviation."""

SPREAD = 0.5
"""How far the factors of two kinds are apart before anything was timed: standard deviation."""


def random_sizes(graph: DependencyGraph, draw: random.Random) -> dict[str, int]:
    """Sizes of all groups: a share for each kind, between a quarter and all, and around it.

    Parameters
    ----------
    graph : DependencyGraph
    draw : random.Random
    """
    kinds = {kind: draw.uniform(0.25, 1.0) for kind in sorted({g.kind for g in graph.prunable})}
    return {
        group.name: max(1, round(min(1.0, kinds[group.kind] * draw.uniform(0.8, 1.2)) * group.size))
        for group in graph.prunable
    }


def fit_factors(predicted: Sequence[Times], measured: Sequence[float]) -> dict[str, float]:
    """How much longer each kind of op takes within a model than alone.

    Parameters
    ----------
    predicted : sequence of mapping
        Of each model timed, the milliseconds of each kind of op, alone.
    measured : sequence of float
        Milliseconds that each model took.

    Returns
    -------
    dict of str to float
        Factors, none negative.

    Notes
    -----
    Ridge regression on relative errors, which is the most probable set of factors when the times
    of whole models are off by `NOISE` and the factors differ by `SPREAD` from the common one: kinds
    that no timed model spends much time in keep about that.
    """
    kinds = sorted({kind for times in predicted for kind in times})
    parts = np.array([[times.get(kind, 0.0) for kind in kinds] for times in predicted])
    parts /= np.array(measured)[:, None]
    common = len(parts) / parts.sum()
    weight = (NOISE / SPREAD) ** 2
    left = parts.T @ parts + weight * np.eye(len(kinds))
    right = parts.sum(axis=0) + weight * common
    factors = np.linalg.solve(left, right)
    return {kind: max(float(factor), 0.0) for kind, factor in zip(kinds, factors, strict=True)}
