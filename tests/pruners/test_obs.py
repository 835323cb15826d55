from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import pruners
from pruners.metrics import obs
from pruners.statistics.moments import EVENNESS, Moments, layer_moments
from tests.depgraph.models import images, tiny
from tests.reference import randomise, state


def problem(units: int, width: int) -> tuple[Tensor, Moments, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(400, units * width, dtype=torch.float64)
    x = F.pad(x @ torch.randn(units * width, units * width, dtype=torch.float64), (0, 1), value=1.0)
    g = torch.randn(400, 5, dtype=torch.float64)
    gradients = g.T @ g / g.square().sum()
    weight = torch.randn(5, units * width, dtype=torch.float64)
    columns = torch.randperm(units * width).reshape(units, width)
    return weight, Moments(x.T @ x, gradients), columns, x


def loss_without(weight: Tensor, moments: Moments, gone: Tensor, x: Tensor) -> float:
    """Half the weighted squared error when the columns that stay are refitted to the outputs."""
    left = torch.ones(x.shape[1], dtype=torch.bool)
    left[gone] = False
    y = x[:, :-1] @ weight.T
    error = y - x[:, left] @ torch.linalg.lstsq(x[:, left], y).solution
    return float(0.5 * (error @ moments.gradients * error).sum())


@pytest.mark.parametrize(("units", "width"), [(6, 1), (5, 3), (80, 1)])
def test_scores_add_up_to_the_error_of_the_best_refit(units: int, width: int) -> None:
    weight, moments, columns, x = problem(units, width)
    scores = obs.eliminate(weight, moments, columns, damping=1e-12)
    order = scores.argsort()
    for count in (1, units // 2, units - 1):
        expected = loss_without(weight, moments, columns[order[:count]].flatten(), x)
        assert float(scores[order[:count]].sum()) == pytest.approx(expected, rel=0.1)


def test_the_first_to_go_is_the_one_that_costs_least() -> None:
    weight, moments, columns, x = problem(8, 2)
    scores = obs.eliminate(weight, moments, columns, damping=1e-12)
    costs = [loss_without(weight, moments, unit, x) for unit in columns]
    assert int(scores.argmin()) == min(range(8), key=costs.__getitem__)
    assert float(scores.min()) == pytest.approx(min(costs), rel=1e-3)


def test_a_copy_of_another_unit_costs_nothing_but_not_both() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight[5], net[0].bias[5] = net[0].weight[0], net[0].bias[0]
    x = torch.randn(300, 5)
    graph = depgraph.trace(net, x[:2])
    metric = pruners.OBS(damping=1e-9)
    scores = metric.score(net, graph, [(x, torch.zeros(300))])["hidden"]
    low, high = sorted(float(scores[unit]) for unit in (0, 5))
    assert low < 1e-6 * float(scores.max()) < 1e-2 * high


def test_moments_are_those_of_inputs_and_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(10, 4)
    found = layer_moments(net, ["2.weight"], [(x[:5], x[:5]), (x[5:], x[5:])], seed=0)["2.weight"]
    hidden = net[:2](x)
    logits = net[2](hidden).detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat(
        [
            torch.multinomial(part.softmax(-1), 1, generator=generator).flatten()
            for part in logits.detach().split(5)
        ]
    )
    (g,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    squares = g.square().sum(-1)
    weights = torch.cat([part + EVENNESS * part.mean() for part in squares.split(5)])
    rows = F.pad(hidden, (0, 1), value=1.0).detach()
    torch.testing.assert_close(
        found.inputs.float(), (rows * weights[:, None]).T @ rows / 10, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        found.gradients.float(), g.T @ g / squares.sum(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("still", [False, True])
def test_a_layer_from_few_to_many_is_known_by_the_gradients_of_its_inputs(still: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
    if still:
        nn.init.zeros_(net[4].weight)
    x = torch.randn(50, 4)
    wide, narrow = (layer_moments(net, [name], [(x, x)])[name] for name in ("2.weight", "4.weight"))
    assert narrow.through is None and narrow.gradients.shape == (2, 2)
    assert wide.through is not None and wide.through.shape == (3, 3)
    weight = net[2].weight.detach()
    hidden = net[2](net[:2](x)).detach().requires_grad_()
    logits = net[3:](hidden)
    shares, draw = logits.detach().softmax(-1), torch.Generator().manual_seed(0)
    labels = torch.multinomial(shares, 1, generator=draw).flatten()
    (g,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), hidden)
    moment = torch.eye(9) if still else g.T @ g / g.square().sum()
    found = wide.weighted(weight)
    torch.testing.assert_close((found.T @ found).float(), weight.T @ moment @ weight)
    torch.testing.assert_close(wide.spread.float(), 0 * moment[0] if still else moment.diagonal())


def test_scoring_leaves_weights_gradients_and_modes_alone() -> None:
    model = tiny().train()
    model.cls_token.requires_grad_(False)
    before = state(model)
    graph = depgraph.trace(model, images())
    batches = [(images(4), torch.arange(4))]
    scores = pruners.score(model, graph, "obs", batches)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert not model.cls_token.requires_grad and model.pos_embed.requires_grad
    assert all(bool((values >= 0).all()) and values.any() for values in scores.values())


def test_a_target_is_met_within_one_percent_and_the_stream_left_whole() -> None:
    model = tiny()
    batches = [(images(16), torch.arange(16) % 10)]
    dense = depgraph.count_macs(model, images())
    small, plan = pruners.prune(
        model, images(), "obs", target={"macs": 0.6}, kinds="auto", batches=batches
    )
    assert plan.macs == pytest.approx(0.6 * dense, rel=0.02)
    assert "embed" not in plan.kept_units
    assert depgraph.count_macs(small, images()) == plan.macs


def test_scores_of_features_know_nothing_of_the_head() -> None:
    model = randomise(tiny())
    graph = depgraph.trace(model, images())
    data = [(images(16), torch.zeros(16, dtype=torch.long))]
    before = {m: pruners.score(model, graph, m, data) for m in ("obs", "obs_features")}
    with torch.no_grad():
        model.head.weight.normal_()
    for metric, scores in before.items():
        now = pruners.score(model, graph, metric, data)
        same = all(torch.equal(scores[g.name], now[g.name]) for g in graph.prunable
                   if g.kind == "hidden")  # fmt: skip
        assert same == (metric == "obs_features")
