from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import pruners
from pruners.statistics.units import reduce_others, sum_over_members
from tests.pruners.networks import NETWORKS, batches, gated, network


def loss_by_gate(
    model: nn.Module, group: depgraph.Group, inputs: Tensor, labels: Tensor
) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of the gates of a group's units."""

    def loss(gate: Tensor) -> Tensor:
        weights = gated(model, group, gate)
        return F.cross_entropy(torch.func.functional_call(model, weights, (inputs,)), labels)

    return loss


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_and_taylor2_square_the_gate_gradient_of_each_sample(name: str) -> None:
    model, inputs = network(name)
    graph = depgraph.trace(model, inputs[:2])
    data = batches(inputs)
    fisher = pruners.score(model, graph, "fisher", data)
    taylor2 = pruners.score(model, graph, "taylor2", data)
    labels = torch.cat([targets for _, targets in data])
    precise = copy.deepcopy(model).double()
    real = inputs.double() if inputs.is_floating_point() else inputs
    for group in graph.prunable[:4]:
        ones = torch.ones(group.size, dtype=torch.float64)
        singles = zip(real.split(1), labels.split(1), strict=True)
        losses = [loss_by_gate(precise, group, x, y) for x, y in singles]
        each = torch.stack([torch.func.grad(loss)(ones) for loss in losses])
        half = each.square().mean(0) / 2
        torch.testing.assert_close(fisher[group.name], half, rtol=1e-3, atol=1e-6)
        change = (half - each.mean(0)).abs()
        torch.testing.assert_close(taylor2[group.name], change, rtol=1e-2, atol=1e-5)


def small_net() -> tuple[nn.Module, Tensor, depgraph.DependencyGraph]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(12, 4)
    return net, x, depgraph.trace(net, x[:2])


def test_gauss_newton_converges_to_the_diagonal_of_jacobians_around_the_outputs_hessian() -> None:
    net, x, graph = small_net()
    scores = pruners.score(net, graph, pruners.GaussNewton(draws=600), batches(x))
    weights = {name: p.detach() for name, p in net.named_parameters()}
    diagonal = {name: torch.zeros_like(p) for name, p in weights.items()}
    for sample in x:
        shares = net(sample).detach().softmax(0)
        outer = shares.diag() - torch.outer(shares, shares)
        jacobian = torch.func.jacrev(lambda w, s=sample: torch.func.functional_call(net, w, (s,)))(
            weights
        )
        for name, j in jacobian.items():
            flat = j.flatten(1)
            diagonal[name] += ((outer @ flat) * flat).sum(0).view_as(diagonal[name]) / len(x)
    expected = sum_over_members(
        graph, lambda name, dim: reduce_others(weights[name] ** 2 * diagonal[name], dim) / 2
    )
    torch.testing.assert_close(scores["hidden"], expected["hidden"], rtol=0.1, atol=0)


def test_gauss_newton_reads_no_labels_and_depends_on_its_seed() -> None:
    net, x, graph = small_net()
    data, other = batches(x), [(inputs, targets * 0) for inputs, targets in batches(x)]
    one = pruners.score(net, graph, "gauss_newton", data)["hidden"]
    assert torch.equal(one, pruners.score(net, graph, "gauss_newton", other)["hidden"])
    again = pruners.score(net, graph, "gauss_newton", data, seed=1)["hidden"]
    assert not torch.equal(one, again)


@pytest.mark.parametrize("name", ["convolutions", "twice"])
def test_hutchinson_converges_to_the_second_derivative_by_a_gate(name: str) -> None:
    model, inputs = network(name)
    graph = depgraph.trace(model, inputs[:2])
    data = batches(inputs, 12)
    scores = pruners.score(model, graph, pruners.Hutchinson(draws=400), data)
    for group in graph.prunable[:3]:
        loss = loss_by_gate(model, group, inputs, data[0][1])
        diagonal = torch.func.jacrev(torch.func.grad(loss))(torch.ones(group.size)).diagonal()
        found, expected = scores[group.name], (diagonal / 2).clamp_min(0).double()
        assert (found - expected).norm() < 0.35 * expected.norm()


def test_taylor2_is_nearer_to_the_true_change_of_the_loss_than_taylor() -> None:
    torch.manual_seed(1)
    net, x, graph = small_net()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
    labels = torch.arange(12) % 3
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimiser.step()
    data = batches(x, 12, 3)
    with torch.no_grad():
        before = F.cross_entropy(net(x), labels)
        changes = []
        for unit in range(6):
            off = copy.deepcopy(net)
            off[2].weight[:, unit] = 0
            changes.append((F.cross_entropy(off(x), labels) - before).abs())
    measured = torch.stack(changes).double()
    errors = {
        metric: (pruners.score(net, graph, metric, data)["hidden"] - measured).norm()
        for metric in ("taylor", "taylor2")
    }
    assert errors["taylor2"] < errors["taylor"]
