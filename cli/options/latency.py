"""What the latency table says of a plan, for the result that is written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import depgraph
import pruners


def predicted(
    graph: depgraph.DependencyGraph,
    plan: depgraph.Plan,
    share: Mapping[str, Any],
    clock: Mapping[str, Any],
) -> dict[str, float]:
    """The share of the latency that a plan keeps, where a target of latency was asked for.

    Parameters
    ----------
    graph : DependencyGraph
        Of the dense model.
    plan : Plan
    share : mapping
        ``{"ratio": r}`` or ``{"target": {...}}``.
    clock : mapping
        Arguments of `pruners.measured_latency`, as pruning was given them.

    Returns
    -------
    dict
        ``predicted_latency_kept``, or nothing.
    """
    if "latency" not in share.get("target", {}):
        return {}
    sizes = {name: len(plan.kept_units.get(name, range(n))) for name, n in plan.sizes.items()}
    model = pruners.measured_latency(graph, **clock)
    return {"predicted_latency_kept": model.share(sizes)}
