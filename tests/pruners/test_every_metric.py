from __future__ import annotations

import copy

import pytest
import torch

import depgraph
import pruners
from tests.depgraph.models import images, tiny
from tests.pruners.networks import NETWORKS, batches, network
from tests.reference import state

DRAWN = {"gauss_newton", "hutchinson", "obs", "obs_features"}
"""What draws labels or directions, a batch at a time."""


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("metric", pruners.METRICS)
def test_a_metric_scores_any_model_and_leaves_it_as_it_was(metric: str, name: str) -> None:
    model, inputs = network(name)
    before = copy.deepcopy(state(model))
    graph = depgraph.trace(model, inputs[:2])
    first = pruners.score(model, graph, metric, batches(inputs))
    assert set(first) == {group.name for group in graph.prunable}
    for group in graph.prunable:
        values = torch.as_tensor(first[group.name])
        assert values.shape == (group.size,) and torch.isfinite(values).all()
        assert values.any(), f"{group.name} has no score"
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    again = pruners.score(model, graph, metric, batches(inputs))
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [
        i % 2 == 0 for i in range(len(list(model.parameters())))
    ]
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())
    assert all(torch.equal(torch.as_tensor(first[n]), torch.as_tensor(again[n])) for n in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", pruners.METRICS)
def test_a_model_is_scored_pruned_and_compensated_in_its_own_precision(
    metric: str, dtype: torch.dtype
) -> None:
    model, x = tiny().to(dtype), images(8).to(dtype)
    data = [(x, torch.arange(8) % 10)]
    small, _ = pruners.prune(model, x[:2], metric, 0.4, batches=data, num_samples=8)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small(x).dtype == dtype and small(x).isfinite().all()


@pytest.mark.parametrize("metric", set(pruners.METRICS) - DRAWN)
def test_scores_do_not_depend_on_how_samples_are_batched(metric: str) -> None:
    model, inputs = network("convolutions")
    graph = depgraph.trace(model, inputs[:2])
    one = pruners.score(model, graph, metric, batches(inputs, 12))
    many = pruners.score(model, graph, metric, batches(inputs, 5))
    for name, values in one.items():
        torch.testing.assert_close(many[name], values, rtol=1e-3, atol=1e-7)


def test_metrics_are_listed_from_the_control_on() -> None:
    names = list(pruners.METRICS)
    assert names[:3] == ["random", "l1", "l2"] and names[-2:] == ["obs", "obs_features"]
    assert {"lamp", "fpgm", "norm_scale", "taylor", "hessian"} <= set(names)


def test_a_metric_of_a_user_takes_ten_lines() -> None:
    @pruners.register
    class L3:
        """Sum of cubes over all members of a unit."""

        name, needs_data = "l3", False

        def score(self, model, graph, batches):  # type: ignore[no-untyped-def]
            weights = dict(model.named_parameters())
            cubes = lambda name, dim: pruners.reduce_others(weights[name].abs() ** 3, dim)  # noqa: E731
            return pruners.sum_over_members(graph, cubes)

    try:
        model, inputs = network("convolutions")
        small, _ = pruners.prune(model, inputs[:2], "l3", 0.25)
    finally:
        pruners.METRICS.pop("l3")
    assert small(inputs).shape == (12, 4)
