from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from depgraph import DepgraphError
from pruners.choosing.domain_aware import best_combination, combine_scores

Data = dict[str, list[tuple[Tensor, Tensor]]]


def styles() -> tuple[nn.Module, Data]:
    """Hidden unit d reads what only domain d has, stronger; the last two what all have."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(5))
        net[2].weight.copy_(torch.tensor([[1.0, 1, 1, 1, 1], [-1, -1, -1, -1, -1]]))
    data = {}
    for d, domain in enumerate(("ink", "clay", "wool")):
        x = torch.zeros(32, 5)
        x[:, 3:] = torch.rand(32, 2)
        x[:, d] = 3 * torch.rand(32)
        data[domain] = [(x, (x.sum(1) < 1.5).long())]
    return net, data


@pytest.mark.parametrize("metric", ["fisher", "hessian", "wanda"])
@pytest.mark.parametrize("combine", ["min", "variance"])
def test_units_that_one_domain_uses_go_first(metric: str, combine: str) -> None:
    net, data = styles()
    scorer = pruners.DomainAware(metric, data, combine)
    _, plan = pruners.prune(net, torch.randn(1, 5), scorer, 0.6)
    assert list(plan.kept_units["hidden"]) == [3, 4]
    everything = [batch for batches in data.values() for batch in batches]
    _, plan = pruners.prune(net, torch.randn(1, 5), metric, 0.6, batches=everything, num_samples=96)
    assert list(plan.kept_units["hidden"]) != [3, 4]


def test_a_domain_with_a_larger_loss_does_not_decide_alone() -> None:
    quiet, loud = torch.tensor([1.0, 3.0]), torch.tensor([300.0, 100.0])
    combined = combine_scores({"quiet": {"g": quiet}, "loud": {"g": loud}}, "mean")["g"]
    torch.testing.assert_close(combined, torch.tensor([101.0, 101.0], dtype=torch.float64))


def test_equal_domains_give_the_scores_of_one() -> None:
    one = {"a": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([3.0, 5.0])}
    for how in pruners.COMBINATIONS:
        combined = combine_scores({"x": one, "y": one, "z": one}, how)
        for name, values in one.items():
            torch.testing.assert_close(combined[name], values.double())


def test_variance_takes_off_as_many_deviations_as_it_is_strict() -> None:
    scores = {"x": {"g": torch.tensor([1.0, 2.0, 3.0])}, "y": {"g": torch.tensor([3.0, 2.0, 1.0])}}
    half = combine_scores(scores, "variance", strictness=0.5)["g"]
    torch.testing.assert_close(half, torch.tensor([1.5, 2.0, 1.5], dtype=torch.float64))
    strict = combine_scores(scores, "variance", strictness=10)["g"]
    assert (strict > 0).all() and strict.argmax() == 1


def test_leave_one_out_takes_the_combination_that_foretells_the_domain_left_out() -> None:
    # Units 0 to 2 are each used by one domain alone, unit 3 by all: only the minimum says so.
    each = torch.tensor([[9.0, 0.1, 0.1, 2], [0.1, 9, 0.1, 2], [0.1, 0.1, 9, 2]])
    by_name = {"mean": lambda e: e.mean(0), "min": lambda e: e.amin(0)}
    assert best_combination([each], by_name) == "min"
    same = torch.tensor([[1.0, 2, 3]]).expand(3, 3)
    assert best_combination([same], by_name) == "mean"


def test_each_domain_has_its_share_of_the_samples() -> None:
    net, data = styles()
    graph = depgraph.trace(net, torch.randn(1, 5))
    seen: dict[int, int] = {}

    class Counting:
        name, needs_data, num_samples = "counting", True, 32

        def score(self, model, graph, batches):  # type: ignore[no-untyped-def]
            seen[len(seen)] = sum(len(y) for _, y in batches)
            return {group.name: torch.ones(group.size) for group in graph.prunable}

    pruners.score(net, graph, pruners.DomainAware(Counting(), data))
    pruners.score(net, graph, pruners.DomainAware(Counting(), data, num_samples=6))
    assert list(seen.values()) == [11, 11, 11, 2, 2, 2]
    with pytest.raises(DepgraphError, match="fewer than"):
        pruners.score(net, graph, pruners.DomainAware(Counting(), data, num_samples=600))


def test_it_is_compensated_like_any_metric() -> None:
    net, data = styles()
    everything = [batch for batches in data.values() for batch in batches]
    scorer = pruners.DomainAware("obs", data)
    _, plan = pruners.prune(net, torch.randn(1, 5), scorer, target={"macs": 0.6})
    small, _ = pruners.prune(
        net, torch.randn(1, 5), scorer, target={"macs": 0.6}, batches=everything
    )
    assert not torch.equal(small[2].weight, plan.apply(net)[2].weight)


@pytest.mark.parametrize(
    ("metric", "combine", "take", "message"),
    [
        ("l2", "min", 3, "looks at no data"),
        ("fisher", "varianc", 3, "did you mean 'variance'"),
        ("fisher", "min", 1, "at least two"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    metric: str, combine: str, take: int, message: str
) -> None:
    _, data = styles()
    some = dict(list(data.items())[:take])
    with pytest.raises(DepgraphError, match=message):
        pruners.DomainAware(metric, some, combine)
