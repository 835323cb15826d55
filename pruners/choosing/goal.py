"""What an allocation has to come to: a share of the units, or of a cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real

from torch import Tensor

from depgraph import DependencyGraph, DepgraphError, Group
from pruners.choosing.choices import Unreachable
from pruners.choosing.settling import TOLERANCE, put_back
from pruners.speed.latency import LatencyModel


class Goal:
    """How much has to go: a share of the units, or all but a share of a cost."""

    def __init__(
        self,
        graph: DependencyGraph,
        ratio: float | None,
        target: Mapping[str, float] | None,
        latency: LatencyModel | None,
    ) -> None:
        if (ratio is None) == (target is None):
            raise DepgraphError("give either a ratio or a target, and not both")
        self.graph = graph
        self.latency = latency
        self.ratio = ratio
        if ratio is not None:
            if not isinstance(ratio, Real) or not 0 < ratio < 1:
                raise DepgraphError(f"ratio is {ratio}; the share removed must lie between 0 and 1")
            return
        assert target is not None
        if len(target) != 1 or next(iter(target)) not in ("params", "macs", "latency"):
            raise DepgraphError(
                f"target is {dict(target)}; give one of {{'params': share}}, {{'macs': share}} and "
                "{'latency': share}"
            )
        ((self.what, self.share),) = target.items()
        if not isinstance(self.share, Real) or not 0 < self.share < 1:
            raise DepgraphError(
                f"target {self.what} is {self.share}; the share kept must lie between 0 and 1"
            )

    def costs(self, what: str) -> Callable[[Mapping[str, int]], float]:
        """Share of the dense model's cost, by the units left of each group."""
        if what == "latency":
            assert self.latency is not None  # checked by the allocator
            return self.latency.share
        which = ("params", "macs").index(what)
        dense = self.graph.cost({})[which]
        if not dense:
            raise DepgraphError(f"the model has no {what} at all, so no share of them can be kept")
        return lambda sizes: self.graph.cost(sizes)[which] / dense

    def missing(self, groups: Sequence[Group]) -> Callable[[Mapping[str, int]], float]:
        """What has still to be removed, by the units left of each group."""
        total = sum(group.size for group in groups)
        if self.ratio is not None:
            budget = total - round(self.ratio * total)
            return lambda sizes: sum(sizes[group.name] for group in groups) - budget
        cost = self.costs(self.what)
        return lambda sizes: cost(sizes) - self.share

    def meet(self, at: Callable[[float], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The allocation at the ratio, or the one whose cost is nearest to the target."""
        if self.ratio is not None:
            return at(self.ratio)
        of_sizes = self.costs(self.what)

        def cost(kept: Mapping[str, Tensor]) -> float:
            return of_sizes({name: len(units) for name, units in kept.items()})

        least = cost(at(1.0))
        if self.share < least:
            raise Unreachable(f"target {self.what} {self.share}", least)
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(at(middle)) > self.share else (low, middle)
        kept = min((at(low), at(high)), key=lambda kept: abs(cost(kept) - self.share))
        # where the nearest one is not near, `settle` comes up from below
        return kept if cost(kept) <= self.share * (1 + TOLERANCE) else at(high)

    def settle(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        blocks: Mapping[str, Tensor],
        kept: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The allocation, with blocks put back where its cost fell short of the target."""
        if self.ratio is not None:
            return kept
        return put_back(groups, scores, blocks, kept, self.costs(self.what), self.share)
