"""Training that does by little something else than evaluation is followed, never taken for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from tests.reference import masked, random_units, randomise, relative_difference

Middle = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A stream of 12 channels, of which training makes something else."""

    def __init__(self, middle: Middle, otherwise: Middle = lambda self, x: x) -> None:
        super().__init__()
        self.stem, self.head, self.one = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(1, 1)
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12))
        self.middle, self.otherwise = middle, otherwise

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mlp(x)
        y: Tensor = self.head((self.middle if self.training else self.otherwise)(self, x))
        return y


class Noted(Net):
    """Reads no mode, but what train() has noted."""

    training_now = False

    def train(self, mode: bool = True) -> Self:
        self.training_now = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mlp(x)
        y: Tensor = self.head(x.flip(-1) if self.training_now else x)
        return y


def example(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 5, 8, generator=generator, dtype=torch.float64)


def by_first(self: Any, x: Tensor) -> Tensor:
    y = x.permute(2, 0, 1)
    return (y * y.new_ones(len(y), 1, 1).cumsum(0)).permute(1, 2, 0)


def by_weight(self: Any, x: Tensor) -> Tensor:
    weight: Tensor = self.one.weight.exp()[0]
    return x * weight


def by_place(self: Any, x: Tensor) -> Tensor:
    weight: Tensor = self.one.weight.exp()[0]
    return x * weight.expand(x.shape[-1]).cumsum(0)


PAIRS: dict[str, tuple[Middle, ...]] = {
    "times a place": (lambda self, x: x * x.new_ones(x.shape[-1]).cumsum(0),),
    "over a place": (lambda self, x: x / x.new_full((x.shape[-1],), 2.0).cumsum(0),),
    "times a place of the first dimension": (by_first,),
    "times a learnt number": (by_place, by_weight),
    "times a width": (lambda self, x: x * x.shape[-1],),
    "times a width for a number": (lambda self, x: x * x.shape[-1], lambda self, x: x * 2),
    "plus a width for a number": (lambda self, x: x + x.shape[-1], lambda self, x: x + 2),
    "a slope by width": (
        lambda self, x: F.leaky_relu(x, x.shape[-1] / 12),
        lambda self, x: F.leaky_relu(x, 0.5),
    ),
    "numbers by width": (lambda self, x: x * torch.ones(12, dtype=x.dtype),),
    "for each sample": (lambda self, x: x.div(0.5) * x.new_ones(len(x), 1, 1),),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_training_and_evaluation_are_exact(name: str, training: bool) -> None:
    model = randomise(Net(*PAIRS[name])).double().train(training)
    graph = depgraph.trace(model, example(2))
    plan = graph.plan(random_units(graph, 0))
    small = plan.apply(model)
    for mode in (False, True):
        for batch in (2, 3):
            expected = masked(model, plan).train(mode)(example(batch))
            got = copy.deepcopy(small).train(mode)(example(batch))
            assert relative_difference(got, expected) < 1e-9


def test_what_train_notes_is_seen() -> None:
    model = Noted(lambda self, x: x).double().eval()
    graph = depgraph.trace(model, example(2))
    with pytest.raises(depgraph.DepgraphError, match="does not follow the plan"):
        graph.plan(random_units(graph, 0)).apply(model)
