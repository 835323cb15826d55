from __future__ import annotations

import pytest
import torch
from torch import nn

import depgraph
from depgraph import DepgraphError
from pruners.choosing.allocation import allocate
from tests.depgraph.models import images, tiny


def equal_scores(graph: depgraph.DependencyGraph) -> dict[str, torch.Tensor]:
    return {group.name: torch.ones(group.size) for group in graph.prunable}


def test_of_equal_scores_the_dearest_unit_goes_first() -> None:
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 90))
    graph = depgraph.trace(net, torch.randn(2, 4))
    cheap, dear = graph.prunable
    kept = allocate(graph, equal_scores(graph), ratio=0.2, per="macs")
    assert len(kept[cheap.name]) == 10 and len(kept[dear.name]) == 2


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
def test_a_target_is_met_to_the_unit(what: str, share: float) -> None:
    graph = depgraph.trace(tiny(), images())
    kept = (
        allocate(
            graph, equal_scores(graph), target={what: share}, per=what, kinds=["hidden", "head_dim"]
        )
        if share > 0.5
        else allocate(graph, equal_scores(graph), target={what: share}, per=what)
    )
    plan = graph.plan(kept)
    got, dense = (plan.macs, graph.macs) if what == "macs" else (plan.num_params, graph.num_params)
    assert share * 0.93 < got / dense <= share * 1.005


def test_a_ratio_removes_that_many_units() -> None:
    graph = depgraph.trace(tiny(), images())
    kept = allocate(graph, equal_scores(graph), ratio=0.3, per="macs")
    total = sum(graph.group(name).size for name in kept)
    assert sum(map(len, kept.values())) == total - round(0.3 * total)


def test_counts_are_multiples_of_what_is_asked_for() -> None:
    graph = depgraph.trace(tiny(), images())
    kept = allocate(graph, equal_scores(graph), ratio=0.4, per="macs", round_to=4, kinds="hidden")
    assert all(len(units) % 4 == 0 for units in kept.values())


def test_the_lowest_scores_of_a_group_go() -> None:
    graph = depgraph.trace(tiny(), images())
    scores = {g.name: torch.rand(g.size, dtype=torch.float64) for g in graph.prunable}
    kept = allocate(graph, scores, ratio=0.3, per="macs", normalise="none")
    for name, units in kept.items():
        gone = torch.ones(graph.group(name).size, dtype=torch.bool)
        gone[units] = False
        if gone.any():
            assert scores[name][gone].max() <= scores[name][~gone].min()


def test_auto_leaves_heads_and_embed_whole_unless_they_are_needed() -> None:
    graph = depgraph.trace(tiny(), images())
    scores = equal_scores(graph)
    mild = allocate(graph, scores, target={"macs": 0.6}, per="macs", kinds="auto")
    assert {graph.group(name).kind for name in mild} == {"head_dim", "hidden"}
    hard = allocate(graph, scores, target={"macs": 0.02}, per="macs", kinds="auto")
    assert len(hard["embed"]) < graph.group("embed").size
    plain = allocate(graph, scores, target={"macs": 0.02}, kinds="auto")
    assert len(plain["embed"]) < graph.group("embed").size


def test_what_cannot_be_reached_is_said() -> None:
    graph = depgraph.trace(tiny(), images())
    with pytest.raises(DepgraphError, match=r"cannot be reached.*at least 0\."):
        allocate(graph, equal_scores(graph), target={"macs": 0.1}, per="macs", kinds="head_dim")


def test_per_cost_needs_one_ranking() -> None:
    graph = depgraph.trace(tiny(), images())
    with pytest.raises(DepgraphError, match=r"per 'macs'.*scope global"):
        allocate(graph, equal_scores(graph), ratio=0.5, per="macs", scope="uniform")
    with pytest.raises(DepgraphError, match="unknown per 'mac'; did you mean 'macs'"):
        allocate(graph, equal_scores(graph), ratio=0.5, per="mac")
