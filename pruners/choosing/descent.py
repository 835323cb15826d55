"""Cost-aware allocation: the units that go are those that matter least for what they cost.

Starting from the dense model, blocks of units are removed in the order of score per cost saved.
What a unit saves depends on what else is left (a head dim is worth less when heads are gone), so
the savings are taken anew, from the plan's polynomial cost, each time the model has shrunk a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from depgraph import Group
from pruners.choosing.choices import Unreachable

STEP = 0.02
"""Share of the cost after which savings are taken anew."""

Cost = Callable[[Mapping[str, int]], float]
"""Units left of each group -> share of the dense model's cost."""


def descend(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    cost: Cost,
    enough: Callable[[Mapping[str, int]], float],
) -> dict[str, Tensor]:
    """Remove blocks of units, the least score per cost first, until there is enough.

    Parameters
    ----------
    groups : sequence of Group
    scores : mapping of str to Tensor
        Comparable between groups: a sum of them is what the removal of several units costs.
    blocks : mapping of str to LongTensor
        Sizes of the blocks in which the units of a group may go, one after the other.
    cost : callable
    enough : callable
        How much is still to be removed, in any unit; the descent ends at zero or below.

    Returns
    -------
    dict of str to LongTensor
        Units kept, ascending.

    Raises
    ------
    Unreachable
        When all blocks are gone and it is not enough.
    """
    path = _Path(groups, scores, blocks, cost)
    while enough(path.sizes) > 0:
        if not path.step(enough):
            raise Unreachable("what is asked for", cost(path.sizes))
    return path.kept()


class _Path:
    def __init__(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        blocks: Mapping[str, Tensor],
        cost: Cost,
    ) -> None:
        self.cost = cost
        self.orders = {g.name: torch.argsort(scores[g.name], stable=True) for g in groups}
        self.blocks = {g.name: blocks[g.name].tolist() for g in groups}
        self.prices = {g.name: _prices(scores[g.name], self.blocks[g.name]) for g in groups}
        self.taken = {g.name: 0 for g in groups}
        self.sizes = {g.name: g.size for g in groups}

    def step(self, enough: Callable[[Mapping[str, int]], float]) -> bool:
        """Remove some blocks, no more than needed; False when none is left."""
        queue = self._queue()
        low, high = 0, len(queue)  # the fewest blocks that are enough lie in (low, high]
        if enough(self._after(queue)) <= 0:
            while high - low > 1:
                middle = (low + high) // 2
                done = enough(self._after(queue[:middle])) <= 0
                low, high = (low, middle) if done else (middle, high)
        self.sizes = self._after(queue[:high])
        for name in queue[:high]:
            self.taken[name] += 1
        return bool(queue)

    def _queue(self) -> list[str]:
        """The groups that lose the next blocks, one after the other, for a step of the cost."""
        before = self.cost(self.sizes)
        ranked = []
        for name, blocks in self.blocks.items():
            at = self.taken[name]
            if at == len(blocks):
                continue
            smaller = {**self.sizes, name: self.sizes[name] - blocks[at]}
            saved = max((before - self.cost(smaller)) / blocks[at], 1e-30)
            ranked += [
                (self.prices[name][i] / saved, name, saved * blocks[i])
                for i in range(at, len(blocks))
            ]
        queue: list[str] = []
        shrunk = 0.0
        for _, name, saved in sorted(ranked, key=lambda item: item[0]):
            queue.append(name)
            shrunk += saved
            if shrunk >= STEP * before:
                break
        return queue

    def _after(self, queue: Sequence[str]) -> dict[str, int]:
        sizes, taken = dict(self.sizes), dict(self.taken)
        for name in queue:
            sizes[name] -= self.blocks[name][taken[name]]
            taken[name] += 1
        return sizes

    def kept(self) -> dict[str, Tensor]:
        sizes = {name: len(order) - self.sizes[name] for name, order in self.orders.items()}
        return {name: order[sizes[name] :].sort().values for name, order in self.orders.items()}


def _prices(scores: Tensor, blocks: Sequence[int]) -> list[float]:
    """Mean score of each block, never falling: a block goes only after those before it."""
    if not blocks:
        return []
    ends = torch.tensor(blocks).cumsum(0)
    running = torch.cat([torch.zeros(1, dtype=torch.float64), scores.sort().values.cumsum(0)])
    sizes = torch.tensor(blocks)
    prices = (running[ends] - running[ends - sizes]) / sizes
    return [float(price) for price in prices.cummax(0).values]
