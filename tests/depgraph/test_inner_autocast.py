"""A forward that turns autocast on or off keeps doing so, or is not written anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from tests.reference import random_units, randomise


class Stream(nn.Module):
    """Attention over heads of which some are cut: the forward has to be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.mlp = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, 12)
        result: Tensor = self.head(x + self.more(x + self.out(y)).to(x.dtype))
        return result

    def more(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Turned(Stream):
    """Its own code turns autocast on, for a child and for an op."""

    def more(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.matmul(x, x.mT @ x)


class TurnedForChild(Stream):
    def more(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = self.mlp(x)
            return y


class TurnedOff(Stream):
    def more(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.mlp(x.float())
            return y


def small_of(model: nn.Module) -> nn.Module:
    graph = depgraph.trace(randomise(model).eval(), torch.randn(2, 5, 8))
    return graph.plan(random_units(graph, 0)).apply(model)


@pytest.mark.parametrize("kind", [Turned, TurnedForChild])
def test_a_forward_that_turns_autocast_on_is_not_rewritten(kind: type[nn.Module]) -> None:
    with pytest.raises(depgraph.DepgraphError, match="turns autocast on or off"):
        small_of(kind())


def test_one_that_turns_it_off_is_refused_where_it_is_on() -> None:
    small = small_of(TurnedOff())
    assert small(torch.randn(3, 5, 8)).shape == (3, 5, 3)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(depgraph.DepgraphError, match="turns autocast on or off"),
    ):
        small(torch.randn(3, 5, 8))
