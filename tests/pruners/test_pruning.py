from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from pruners.registry import METRICS
from tests.depgraph.models import TINY, images, tiny


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95])
def test_every_ratio_gives_a_model_that_runs_with_the_predicted_size(
    name: str, ratio: float
) -> None:
    model = tiny(name)
    small, plan = pruners.prune(model, images(), "l2", ratio)
    assert small(images()).shape == (2, 10)
    assert plan.num_params == sum(p.numel() for p in small.parameters())
    assert plan.macs == depgraph.count_macs(small, images())
    graph = depgraph.trace(model, images())
    assert plan.macs < graph.macs * (1 - ratio)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_prunes(metric: str) -> None:
    model = tiny()
    data = [(images(4), torch.arange(4))]
    small, plan = pruners.prune(model, images(), metric, 0.5, batches=data)
    assert small(images()).shape == (2, 10) and plan.kept_units


def test_a_user_metric_is_an_object_with_three_names() -> None:
    class First:
        name, needs_data = "first", False

        def score(
            self, model: nn.Module, graph: depgraph.DependencyGraph, batches: Sequence
        ) -> dict[str, Tensor]:
            return {g.name: torch.arange(g.size, 0, -1.0) for g in graph.prunable}

    _, plan = pruners.prune(tiny(), images(), First(), 0.5, scope="uniform")
    assert plan.kept_units["embed"] == tuple(range(24))


def test_a_target_is_met_and_the_original_kept() -> None:
    model = tiny()
    before = model(images())
    _, plan = pruners.prune(model, images(), "l1", target={"macs": 0.4})
    assert plan.macs == pytest.approx(0.4 * depgraph.count_macs(model, images()), rel=0.02)
    assert torch.equal(model(images()), before)


def test_frozen_weights_are_pruned_and_stay_frozen() -> None:
    model = tiny()
    model.requires_grad_(False)
    data = [(images(4), torch.arange(4))]
    small, _ = pruners.prune(model, images(), "hessian", 0.5, batches=data)
    assert not any(p.requires_grad for p in small.parameters())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_pruning_five_times_leaves_at_least_one_unit_everywhere() -> None:
    model = tiny()
    for _ in range(5):
        model, _ = pruners.prune(model, images(), "l2", 0.5)
    assert model(images()).shape == (2, 10)
    assert model.blocks[0].attn.num_heads >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "hesian"}, "did you mean 'hessian'"),
        ({"metric": object()}, "is no metric"),
        ({"metric": "hessian"}, "needs data"),
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"target": {"time": 0.5}}, "macs"),
    ],
)
def test_wrong_arguments_are_refused_and_the_model_kept(arguments: dict, message: str) -> None:
    model = tiny()
    before = model(images())
    with pytest.raises(depgraph.DepgraphError, match=message):
        pruners.prune(model, images(), **arguments)
    assert torch.equal(model(images()), before)
