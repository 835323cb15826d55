"""Metrics that read the weights only, against sums over units written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from pruners.metrics.norm_scale import scales_of
from tests.depgraph.models import images, tiny
from tests.pruners.networks import network


def held(model: nn.Module, group: depgraph.Group) -> list[Tensor]:
    """All numbers that each unit of a group holds, one vector a unit."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    return [
        torch.cat(
            [
                weights[m.parameter].index_select(m.dim, m.positions[unit]).flatten()
                for m in group.members
            ]
        )
        for unit in range(group.size)
    ]


@pytest.mark.parametrize("name", ["convolutions", "beit_base_patch16_224"])
def test_lamp_is_the_share_of_a_unit_in_what_is_left_when_its_turn_comes(name: str) -> None:
    model, inputs = network(name)
    graph = depgraph.trace(model, inputs[:2])
    scores = pruners.score(model, graph, "lamp")
    for group in graph.prunable:
        squares = torch.stack([unit.square().sum() for unit in held(model, group)])
        left = float(squares.sum())
        for unit in squares.argsort(stable=True):
            expected = squares[unit] / left
            torch.testing.assert_close(scores[group.name][unit], expected, rtol=1e-4, atol=1e-9)
            left -= float(squares[unit])


def test_lamp_is_ranked_without_normalisation_unless_told() -> None:
    model, inputs = network("beit_base_patch16_224")
    plans = {
        how: pruners.prune(model, inputs[:2], "lamp", 0.5, normalise=how)[1].kept_units
        for how in (None, "none", "mean")
    }
    kept = {how: {n: list(map(int, u)) for n, u in plan.items()} for how, plan in plans.items()}
    assert kept[None] == kept["none"] != kept["mean"]


@pytest.mark.parametrize("name", ["convolutions", "tied", "beit_base_patch16_224"])
def test_fpgm_is_the_sum_of_the_distances_to_all_other_units(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruners.metrics.geometric_median.BLOCK", 5)
    model, inputs = network(name)
    graph = depgraph.trace(model, inputs[:2])
    scores = pruners.score(model, graph, "fpgm")
    for group in graph.prunable:
        units = held(model, group)
        for u, unit in enumerate(units):
            expected = sum(((unit - other).norm() for other in units), torch.zeros(()))
            torch.testing.assert_close(
                scores[group.name][u], expected.double(), rtol=1e-4, atol=1e-6
            )


def test_fpgm_removes_a_unit_that_others_can_stand_in_for_before_a_smaller_one() -> None:
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[4.0, 4], [4, 5], [5, 4], [0, 0.1]]))
        net[2].weight.fill_(1)
    graph = depgraph.trace(net, torch.randn(2, 2))
    assert pruners.score(net, graph, "fpgm")["hidden"].argmin() == 0
    assert pruners.score(net, graph, "l2")["hidden"].argmin() == 3


def test_norm_scale_adds_up_norm_weights_and_layer_scales() -> None:
    model = tiny(init_values=0.5)
    graph = depgraph.trace(model, images())
    assert scales_of(graph) == {
        *(f"blocks.{i}.norm{j}.weight" for i in (0, 1) for j in (1, 2)),
        *(f"blocks.{i}.ls{j}.gamma" for i in (0, 1) for j in (1, 2)),
        "norm.weight",
    }
    weights = dict(model.named_parameters())
    expected = sum((weights[name].abs() for name in scales_of(graph)), torch.zeros(48))
    scores = pruners.score(model, graph, "norm_scale")
    torch.testing.assert_close(scores["embed"].float(), expected.detach())
    norms = pruners.score(model, graph, "l2")
    hidden = "blocks.0.mlp.hidden"  # no norm, no layer scale
    assert torch.equal(scores[hidden], norms[hidden])


def test_norm_scale_of_convolutions_is_that_of_network_slimming() -> None:
    model, inputs = network("convolutions")
    graph = depgraph.trace(model, inputs[:2])
    scores = pruners.score(model, graph, "norm_scale")
    both = model[1].weight.abs() + model[4].weight.abs()  # a depthwise layer keeps the channels
    group = next(g for g in graph.prunable if g.size == 8)
    torch.testing.assert_close(scores[group.name].float(), both.detach())


def test_a_factor_of_another_weight_is_no_scale() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6, 1))
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(x, self.up.weight * self.gain).relu()
            return self.down(hidden * self.scale)

    graph = depgraph.trace(Standardised(), torch.randn(2, 3))
    assert scales_of(graph) == {"scale"}
