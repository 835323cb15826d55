from __future__ import annotations

import json

import pytest
import torch

import depgraph
from depgraph.plan import Plan
from tests.depgraph.models import images, tiny


@pytest.fixture(scope="module")
def graph() -> depgraph.DependencyGraph:
    return depgraph.trace(tiny(), images())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "no unit would be left"),
        ([0, 48], r"unit 48 is not in 0\.\.47"),
        ([-1], "unit -1"),
        ([3, 3], "unit 3 is kept twice"),
        ([0.5], "must be integers"),
        ([True], "must be integers"),
        (torch.ones(48, dtype=torch.bool), "1-d tensor of integers"),
    ],
)
def test_wrong_units_are_refused_with_the_group(
    graph: depgraph.DependencyGraph, units: object, message: str
) -> None:
    with pytest.raises(depgraph.DepgraphError, match=f"'embed'.*{message}"):
        graph.plan({"embed": units})  # type: ignore[dict-item]


def test_a_frozen_group_keeps_all_units(graph: depgraph.DependencyGraph) -> None:
    frozen = next(g for g in graph.groups if g.frozen and "output" in g.frozen)
    graph.plan({frozen.name: range(frozen.size)})
    with pytest.raises(depgraph.DepgraphError, match="frozen"):
        graph.plan({frozen.name: [0]})


def test_order_of_units_does_not_matter(graph: depgraph.DependencyGraph) -> None:
    assert graph.plan({"embed": [7, 2, 5]}) == graph.plan({"embed": torch.tensor([2, 5, 7])})


def test_kept_names_indices_of_the_original(graph: depgraph.DependencyGraph) -> None:
    plan = graph.plan({"blocks.0.attn.heads": [1], "blocks.0.attn.head_dim": [0, 11]})
    kept = plan.kept["blocks.0.attn.qkv.bias"][0].tolist()
    assert kept == [12, 23, 60, 71, 108, 119]
    assert plan.kept["blocks.0.attn.qkv.weight"][1].tolist() == list(range(48))


def test_json_gives_the_same_plan_back(graph: depgraph.DependencyGraph) -> None:
    plan = graph.plan({"embed": range(0, 48, 2), "blocks.1.attn.heads": [0, 3]})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert all(
        torch.equal(again.kept[name][dim], indices)
        for name, dims in plan.kept.items()
        for dim, indices in dims.items()
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "sizes": 3}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(depgraph.DepgraphError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("units", [[0.5], ["1"], "12", [True], [float("inf")], None])
def test_units_that_are_no_integers_are_refused(
    graph: depgraph.DependencyGraph, units: object
) -> None:
    data = json.loads(graph.plan({"embed": range(20)}).to_json())
    data["kept_units"]["embed"] = units
    with pytest.raises(depgraph.DepgraphError, match="no list of integers"):
        Plan.from_json(json.dumps(data))


def test_a_size_that_is_no_number_is_refused(graph: depgraph.DependencyGraph) -> None:
    data = json.loads(graph.plan({"embed": range(20)}).to_json())
    for key, value in (("sizes", {"embed": "many"}), ("macs", float("inf"))):
        with pytest.raises(depgraph.DepgraphError, match="no plan"):
            Plan.from_json(json.dumps({**data, key: value}))


def test_a_plan_for_another_model_is_refused(graph: depgraph.DependencyGraph) -> None:
    plan = graph.plan({"embed": range(20)})
    with pytest.raises(depgraph.DepgraphError, match=r"another model: parameter 'cls_token'"):
        plan.apply(tiny(embed_dim=64))
    with pytest.raises(depgraph.DepgraphError, match="another model"):
        Plan.from_json(plan.to_json()).apply(tiny(num_heads=2))
