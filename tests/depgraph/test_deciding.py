"""Whether code decides by sizes is told by what it asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from depgraph.tracing.deciding import decisions_noted
from tests.reference import masked, random_units, randomise


def checked(x: Tensor) -> Any:
    if x.shape[1] != 3:
        raise ValueError(f"{x.shape[1]} channels")
    torch._assert(x.shape[2] == 4, "no")
    return x


def unpacked(x: Tensor) -> Tensor:
    first, _ = x.unbind(0)
    one, _, _ = first
    return one


LAYERS = nn.ModuleList([nn.ReLU(), nn.Tanh()])
DECIDING: dict[str, Callable[[Tensor], Any]] = {
    "a branch": lambda x: x if x.shape[0] > 1 else -x,
    "a number of a sum": lambda x: x if x.size(1) % 2 else -x,
    "elements": lambda x: x if x.numel() == 24 else -x,
    "the length": lambda x: x if len(x) == 2 else -x,
    "what is not zero": lambda x: x if x.shape[1] - 3 else -x,
    "a root": lambda x: x if math.sqrt(x.shape[2]) > 1 else -x,
    "a minimum": lambda x: x[: min(x.shape[0], 3)],
    "a table": lambda x: x if {7: 1}.get(x.shape[1]) else -x,
    "bits": lambda x: x if x.shape[1] >> 2 & 1 else -x,
    "a name": lambda x: getattr(x, f"dim{x.shape[1]}", x),
    "bytes": lambda x: x if x.nbytes == 96 else -x,
    "a stride": lambda x: x if x.stride(0) == 12 else -x,
    "memory in order": lambda x: x if x.mT.is_contiguous() else -x,
    "as often": lambda x: [x for _ in range(x.shape[1] - 3)],
    "a layer by its number": lambda x: LAYERS[x.shape[1] // 3](x),
    "a place in a list": lambda x: [x, -x][(x.shape[1] + 1) % 2],
    "a part of a list": lambda x: [x, -x][: x.shape[1] - 2],
    "a list so many times": lambda x: [x] * x.shape[0],
    "parts": lambda x: x if len(x.unbind(1)) > 6 else -x,
    "parts of some length": lambda x: [*x.split(2, 1)],
    "what a loop goes over": lambda x: [-row for row in x],
    "elements, asked of a shape": lambda x: x if x.shape.numel() == 24 else -x,
    "elements, asked of torch": lambda x: x if torch.numel(x) == 24 else -x,
    "a fraction": lambda x: x if x.shape[1] * 0.5 > 2 else -x,
    "equal shapes": lambda x: x if x.shape == x.mT.shape else -x,
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "views": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2]).expand(x.shape[0], -1),
    "checks": checked,
    "torch's own code": lambda x: F.layer_norm(x, x.shape[1:]) + F.interpolate(x, x.shape[2]),
    "a mean": lambda x: x.sum(1) / x.shape[1] + torch.zeros(x.shape[2], device=x.device),
    "parts that are named": unpacked,
    "a loop over layers": lambda x: [LAYERS[i](x) for i, _ in enumerate((1, 2))],
    "some of a tensor": lambda x: x[:, : x.shape[1] - 1, 0],
    "numbers of its own": lambda x: x if len([1, 2]) > 1 else -x,
}


@pytest.mark.parametrize("name", [*DECIDING, *OTHERS])
def test_a_decision_is_noted_and_nothing_else(name: str) -> None:
    x = torch.empty(2, 3, 4, device="meta")
    with decisions_noted() as found:
        {**DECIDING, **OTHERS}[name](x)
    assert found.made == (name in DECIDING)
    assert all(type(size) is int for size in (*x.shape, x.size(0), x.numel(), len(x)))


class AtOneSize(nn.Module):
    """Reverses its channels for one number of tokens alone."""

    def __init__(self, is_that: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.stem, self.head, self.is_that = nn.Linear(8, 12), nn.Linear(12, 3), is_that
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.mlp(y)
        result: Tensor = self.head(y.flip(-1) if self.is_that(x) else y)
        return result


@pytest.mark.parametrize(
    "is_that",
    [
        lambda x: x.shape[1] == 4,
        lambda x: x.shape[1] not in (5, 6, 7, 10, 11, 1),
        lambda x: x.shape[:2] == (2, 4),
        lambda x: 3 < x.size(1) < 5,
        lambda x: bool(range(x.shape[1] - 5)),
        lambda x: x.shape[1] // 2 == 2,
        lambda x: (x.shape[0] * x.shape[1]) > 18,
        lambda x: x.shape[1] in {4, 7},
        lambda x: len(x.unbind(1)) > 6,
        lambda x: len(torch.arange(x.shape[1])) == 4,
        lambda x: math.trunc(x.shape[1]) == 4,
        lambda x: [False, True][(x.shape[1] + 1) % 2],
        lambda x: ([False] * 4 + [True] + [False] * 40)[x.shape[1]],
        lambda x: ([False] * 4 + [True] + [False] * 40)[x.size(1)],
    ],
)
def test_what_runs_at_a_size_that_is_asked_for_fits_a_cut(
    is_that: Callable[[Tensor], bool],
) -> None:
    model = randomise(AtOneSize(is_that)).eval()
    graph = depgraph.trace(model, torch.randn(2, 5, 8))
    plan = graph.plan(random_units(graph, 0))
    small = plan.apply(model)
    for tokens in (1, 3, 4, 5, 7, 10):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(small(x), masked(model, plan)(x), atol=1e-4, rtol=1e-4)
