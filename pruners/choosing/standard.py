"""Chooses as many units of each kind in every block as a stock library's constructor can be told.

Which counts go together is not known beforehand: some constructors make the width of a head from
the width of the tokens, some can only be told a whole ratio for the hidden width. The rules below
are tried, the freest first, until `depgraph.Plan.standard` says that a plan is stock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from math import lcm, log
from typing import Any

from torch import Tensor

from depgraph import DependencyGraph, DepgraphError, Group
from depgraph.storing.standard import KINDS
from pruners.choosing.choices import AUTO, Unreachable, check_limits, choose_groups, normalised
from pruners.choosing.goal import Goal
from pruners.speed.latency import LatencyModel

_WIDTH, _RATIO = "heads times head dims are the embedding", "whole ratio of hidden width"
_MULTIPLE = "the embedding is a multiple of heads"
_RULES: tuple[tuple[str, ...], ...] = ((), (_MULTIPLE,), (_WIDTH,), (_RATIO,), (_WIDTH, _RATIO))
_WITHOUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("embed",),
    ("embed", "head_dim"),
    ("heads", "head_dim"),
    ("embed", "head_dim", "heads"),
)
"""Kinds to leave whole where a constructor cannot be told more, unless the caller chose kinds."""


def standard_allocator(
    graph: DependencyGraph,
    *,
    ratio: float | None = None,
    target: Mapping[str, float] | None = None,
    kinds: Iterable[str] | None = None,
    ignore: Sequence[str] = (),
    round_to: int | str = 1,
    min_units: int = 1,
    latency: LatencyModel | None = None,
    **others: Any,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """How to choose the units that stay so that a stock constructor builds the pruned model.

    Parameters
    ----------
    graph : DependencyGraph
    ratio, target, kinds, ignore, round_to, min_units, latency
        See `choosing.allocation`. The ratio is met as nearly as counts allow that go
        together. Without kinds, those are left whole that the constructor cannot be told.
    **others
        Of its arguments those that compare groups, which do not matter: all of a kind keep as many.

    Returns
    -------
    callable
        As that of `allocator`.

    Raises
    ------
    DepgraphError
        For arguments out of range, and nothing left to prune. The callable raises where no
        allocation is stock.
    """
    limits = check_limits(min_units, round_to)
    if limits.round_to == AUTO:
        raise DepgraphError("round_to 'auto' takes a count for each group; give standard a number")
    goal = Goal(graph, ratio, target, latency)
    given = None if kinds is None or kinds == AUTO or tuple(kinds) == (AUTO,) else kinds
    choices = [choose_groups(graph, given, ignore)]
    if given is None:
        choices[0] = [group for group in choices[0] if group.kind in KINDS] or choices[0]
    for without in _WITHOUT[1:] if given is None else ():
        left = [group for group in choices[0] if group.kind not in without]
        if left and left not in choices:
            choices.append(left)

    def choose(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        orders = {g.name: normalised(g, scores, "none").argsort(stable=True) for g in choices[0]}
        for groups, rules in product(choices, _RULES):
            counts = _Counts(graph, groups, rules, int(limits.round_to), limits.min_units)
            with suppress(Unreachable):
                kept = goal.meet(lambda share, counts=counts: counts.kept(share, orders))  # type: ignore[misc]
                if counts.cuts_all(kept) and graph.plan(kept, True).standard() is not None:
                    return kept
        raise DepgraphError(
            "no stock library's constructor is known that makes this model with "
            f"{', '.join(dict.fromkeys(g.kind for g in choices[0]))} cut alike in all blocks, as "
            "far as asked; choose other kinds, or prune without standard"
        )

    return choose


class _Counts:
    """How many units stay of each kind at a share removed, under rules that tie kinds together."""

    def __init__(
        self,
        graph: DependencyGraph,
        groups: Sequence[Group],
        rules: Sequence[str],
        round_to: int,
        min_units: int,
    ) -> None:
        self._groups = groups
        self._rules = rules
        self._cut: dict[tuple[int, ...], bool] = {}
        self._sizes = {group.kind: group.size for group in graph.prunable}
        embeds = [group.size for group in graph.groups if group.kind == "embed"]
        self._embed = max(embeds, default=1)
        self._options = {kind: [size] for kind, size in self._sizes.items()}
        for kind in {group.kind for group in groups}:
            alike = [group for group in groups if group.kind == kind]
            step = lcm(round_to, *(graph.multiple_of(group.name) for group in alike))
            size = min(group.size for group in alike)
            self._options[kind] = [
                count for count in range(1, size + 1) if count >= min_units and count % step == 0
            ] or [size]
            if size not in self._options[kind]:
                self._options[kind].append(size)

    def kept(self, share: float, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Units that stay of each group, the last in its order."""
        wanted = {kind: max((1 - share) * size, 1e-3) for kind, size in self._sizes.items()}
        free = {kind: _nearest(options, wanted[kind]) for kind, options in self._options.items()}
        counts = self._tied(free, wanted)
        whole = [kind for kind, size in self._sizes.items() if counts[kind] == size]
        key = tuple(counts[group.kind] for group in self._groups)
        self._cut[key] = all(free[kind] == self._sizes[kind] for kind in whole)
        return {
            group.name: orders[group.name][group.size - counts[group.kind] :].sort().values
            for group in self._groups
        }

    def cuts_all(self, kept: Mapping[str, Tensor]) -> bool:
        """Whether the rules leave no kind whole of which the share would take units."""
        return self._cut[tuple(len(kept[group.name]) for group in self._groups)]

    def _tied(self, free: Mapping[str, int], wanted: Mapping[str, float]) -> dict[str, int]:
        """Counts that obey the rules, as near to those wanted as there are."""
        counts = dict(free)
        for rule, options in ((_WIDTH, self._widths()), (_MULTIPLE, self._multiples())):
            if rule in self._rules:
                found = sorted(options, key=lambda option: _distance(option, wanted))
                counts.update(*found[:1])
        if _RATIO in self._rules and "hidden" in counts:
            embed = counts.get("embed", self._embed)
            whole = [n for n in self._options["hidden"] if n % embed == 0]
            counts["hidden"] = _nearest(whole or self._options["hidden"], wanted["hidden"])
        return counts

    def _multiples(self) -> Iterator[dict[str, int]]:
        """Counts of heads and the embedding of which the last is a multiple."""
        for heads, embed in product(*(self._options.get(kind, []) for kind in ("heads", "embed"))):
            if embed % heads == 0:
                yield {"heads": heads, "embed": embed}

    def _widths(self) -> Iterator[dict[str, int]]:
        """Counts of heads, head dims and the embedding of which the last is the product."""
        kinds = ("heads", "head_dim", "embed")
        heads, dims, embeds = (self._options.get(kind, []) for kind in kinds)
        allowed = set(embeds)
        for pair in product(heads, dims):
            if pair[0] * pair[1] in allowed:
                yield dict(zip(kinds, (*pair, pair[0] * pair[1]), strict=True))


def _nearest(options: Sequence[int], wanted: float) -> int:
    return min(options, key=lambda count: abs(count - wanted))


def _distance(counts: Mapping[str, int], wanted: Mapping[str, float]) -> float:
    return sum(log(count / wanted[kind]) ** 2 for kind, count in counts.items())
