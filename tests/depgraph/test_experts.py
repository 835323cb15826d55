"""Experts as products by groups: their hidden units go, in multiples that the kernels take."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from tests.interpret import masked_outputs
from tests.reference import relative_difference

WIDTH, HIDDEN, EXPERTS = 16, 32, 3


class Experts(nn.Module):
    """Gated experts over sorted tokens, as transformers runs them by default."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * hidden, WIDTH))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, hidden))

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = self.router(x).argmax(-1).sort()
        counts = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        h = nn.functional.grouped_mm(x[order], self.up.transpose(1, 2), offs=ends)
        gate, value = h.chunk(2, dim=-1)
        h = nn.functional.silu(gate) * value
        h = nn.functional.grouped_mm(h, self.down.transpose(1, 2), offs=ends)
        return x + h[order.argsort()]


class Net(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.before, self.experts = nn.Linear(4, WIDTH), Experts(hidden)
        self.after = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.experts(self.before(x)))
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_units_of_experts_and_the_stream_around_them_go_exactly(dtype: torch.dtype) -> None:
    model, x = Net().eval().to(dtype), torch.randn(6, 4, dtype=dtype)
    graph = depgraph.trace(model, x)
    assert {(g.kind, g.size) for g in graph.prunable} == {("hidden", HIDDEN), ("embed", WIDTH)}
    plan = graph.plan({g.name: range(8) for g in graph.prunable})
    small = plan.apply(model)
    with torch.no_grad():
        (expected,) = masked_outputs(graph, plan, model, (x,))
        assert relative_difference(small(x), expected) < (1e-5 if dtype == torch.float32 else 0.05)
        small.to(torch.bfloat16)(torch.randn(9, 4, dtype=torch.bfloat16))


def test_other_numbers_of_units_are_refused_with_the_multiple() -> None:
    graph = depgraph.trace(Net(), torch.randn(6, 4))
    (hidden,) = (g.name for g in graph.prunable if g.kind == "hidden")
    with pytest.raises(depgraph.DepgraphError, match=r"16 bytes; keep a multiple of 8 units"):
        graph.plan({hidden: range(12)})


@pytest.mark.parametrize(("hidden", "kept"), [(HIDDEN, 16), (20, 12)])
def test_pruning_keeps_multiples(hidden: int, kept: int) -> None:
    """Of what the original is a multiple of as well: 20 runs in float32 alone."""
    choices: dict[str, Any] = {"kinds": ["hidden"], "scope": "uniform"}
    model, x = Net(hidden).eval(), torch.randn(6, 4)
    small, plan = pruners.prune(model, x, "l2", 0.45, **choices)
    assert [len(units) for units in plan.kept_units.values()] == [kept]
    small(x)
