"""Calls that are alike are recorded without their forwards: the trace must be the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import depgraph
from depgraph.tracing.blocks import mapped
from depgraph.tracing.trace import Trace, trace_forward

trace_module = sys.modules["depgraph.tracing.trace"]


def everything(traced: Trace) -> list[Any]:
    """All of a trace as plain data."""
    place = {node: i for i, node in enumerate(traced.nodes)}

    def number(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.shape, value.stride(), value.dtype)
        return f"node {place[value]}" if isinstance(value, fx.Node) else repr(value)

    nodes = [
        (str(n.target), mapped((n.args, dict(n.kwargs), n.meta.get("val")), number))
        for n in traced.nodes
    ]
    sources = [node.meta.get("source") for node in traced.nodes]
    calls = [
        (c.name, c.start, c.end, c.depth, mapped((c.args, c.kwargs, c.output), number))
        for c in traced.calls
    ]
    return [nodes, sources, calls, {place[node]: name for node, name in traced.owner.items()}]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trace with and one without repeated calls, and how many forwards each of them ran."""

    def run(model: nn.Module, *inputs: Tensor) -> tuple[Trace, Trace]:
        quick = trace_forward(model, inputs, {})
        recorded = trace_module._recorded  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(
                trace_module,
                "_recorded",
                lambda *args, **kwargs: recorded(*args, **{**kwargs, "alike": False}),
            )
            return quick, trace_forward(model, inputs, {})

    return run


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_a_trace_with_repeated_calls_is_the_trace(both: Any, name: str, training: bool) -> None:
    model = timm.create_model(name).train(training)
    quick, slow = both(model, torch.randn(2, *model.pretrained_cfg["input_size"]))
    assert everything(quick) == everything(slow)


class Counting(nn.Module):
    """Runs its layer more often each time, by a number that it or its parent holds."""

    times: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = 1
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.seen + len(self.log)):
            x = self.layer(x).relu()
        return x


class Sets(Counting):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.seen += 1
        return x


class Logs(Counting):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.log.append(1)
        return x


class Twice(nn.Module):
    """Calls one module twice, and another before and after setting and restoring its number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.other = inner, Counting()

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.inner(self.inner(x)))
        self.other.seen = 3
        x = self.other(x)
        self.other.seen = 1
        return x


@pytest.mark.parametrize("inner", [Counting, Sets, Logs])
def test_a_module_that_changes_between_its_calls_is_run_each_time(
    both: Any, inner: type[nn.Module]
) -> None:
    quick, slow = both(Twice(inner()), torch.randn(2, 4))
    assert everything(quick) == everything(slow)


def test_which_arguments_are_one_tensor_is_part_of_what_a_call_is_given(both: Any) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.exp() if x is y else x + y

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Pair(), Pair()

        def forward(self, x: Tensor) -> Tensor:
            z = x.relu()
            return self.second(self.first(x, z), self.first(x, x)) + self.second(z, z)

    quick, slow = both(Uses(), torch.randn(2, 4))
    assert everything(quick) == everything(slow)


def test_what_is_written_in_place_is_read_from_there_on(both: Any) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            x.relu_()
            return self.layer(x) + self.count

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = InPlace(), InPlace()

        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            z = self.second(self.first(y)) + self.first(y.exp())
            return z + y + self.first.count + self.second.count

    quick, slow = both(Reads(), torch.randn(2, 4))
    assert everything(quick) == everything(slow)


def test_alike_blocks_run_one_forward() -> None:
    ran = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            ran.append(1)
            return x + self.layer(x)

    graph = depgraph.trace(nn.Sequential(*(Block() for _ in range(5))), torch.randn(2, 4))
    assert len(ran) == 1
    assert sum(node.op == "call_function" for node in graph.traced.nodes) == 10
