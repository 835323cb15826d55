"""What a metric is, and the registry of those that come with the project."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from depgraph import DependencyGraph, DepgraphError

Batch = tuple[Any, Tensor]
"""Inputs of the model and the target class of each sample."""


@runtime_checkable
class Metric(Protocol):
    """Scores the units of every prunable group; higher is more important.

    Attributes
    ----------
    name : str
        How it is called on the command line.
    needs_data : bool
        Whether `score` looks at batches.

    Notes
    -----
    Three attributes may be left out. ``additive = True``: scores are rises of the loss, to be
    ranked between groups as they are, by what a unit saves. ``normalise = "none"``: what the scores
    of each group are divided by when nothing is said, else the mean. ``num_samples = 256``: samples
    it looks at when nothing is said, 64 otherwise.
    """

    name: str
    needs_data: bool

    def score(
        self, model: nn.Module, graph: DependencyGraph, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One score per unit, by group name; the model is left as it was."""
        ...


METRICS: dict[str, type[Metric]] = {}
"""Metric classes by name; `register` adds to it."""


def register(cls: type[Metric]) -> type[Metric]:
    """Class decorator that makes a metric known by its name.

    Examples
    --------
    >>> from pruners import reduce_others, sum_over_members
    >>> @register
    ... class L3:
    ...     "Sum of cubes over all members of a unit."
    ...
    ...     name, needs_data = "l3", False
    ...
    ...     def score(self, model, graph, batches):
    ...         weights = dict(model.named_parameters())
    ...         cubes = lambda name, dim: reduce_others(weights[name].abs() ** 3, dim)
    ...         return sum_over_members(graph, cubes)
    >>> _ = METRICS.pop("l3")
    """
    METRICS[cls.name] = cls
    return cls


def make_metric(metric: str | Metric, *, seed: int = 0) -> Metric:
    """A metric from its name, or the object itself.

    Parameters
    ----------
    metric : str or Metric
    seed : int
        For metrics that draw at random.

    Returns
    -------
    Metric

    Raises
    ------
    DepgraphError
        For an unknown name (near ones are offered), or an object that is no metric.
    """
    if not isinstance(metric, str):
        if isinstance(metric, Metric):
            return metric
        raise DepgraphError(
            f"{type(metric).__name__} is no metric: it needs 'name', 'needs_data' and "
            "'score(model, graph, batches)'"
        )
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DepgraphError(f"unknown metric '{metric}'; {hint}choose one of {', '.join(METRICS)}")
    cls: Any = METRICS[metric]
    draws = "seed" in inspect.signature(cls).parameters
    return cls(seed=seed) if draws else cls()
