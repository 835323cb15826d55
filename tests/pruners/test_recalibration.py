from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import depgraph
import pruners
from pruners.refitting.compensation import compensate
from tests.pruners.networks import batches, network
from tests.reference import state


def net_and_plan() -> tuple[nn.Module, Tensor, depgraph.Plan]:
    """Convolutions whose running statistics are those of the samples; the first norm is not cut."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    x = torch.randn(24, 3, 7, 7)
    for norm in (net[1], net[6]):
        norm.momentum = None
    with torch.no_grad():
        net.train()(x)
    net.eval()
    graph = depgraph.trace(net, x[:2])
    group = next(g for g in graph.prunable if g.size == 12)
    return net, x, graph.plan({group.name: range(5)})


def moments(net: nn.Module, x: Tensor, upto: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return (y := net[:upto](x)).mean((0, 2, 3)), y.var((0, 2, 3))


def test_statistics_after_the_cut_are_those_of_what_reaches_the_norm() -> None:
    net, x, plan = net_and_plan()
    small = plan.apply(net)
    compensate(net, small, plan, batches(x))
    mean, variance = moments(small, x, 6)
    torch.testing.assert_close(small[6].running_mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(small[6].running_var, variance, rtol=1e-2, atol=1e-4)


def test_statistics_before_the_cut_stay_whatever_the_samples_are() -> None:
    net, x, plan = net_and_plan()
    small = plan.apply(net)
    before = copy.deepcopy(net[1].state_dict())
    compensate(net, small, plan, batches(x + 3))
    for name, value in before.items():
        torch.testing.assert_close(small[1].state_dict()[name], value)


def test_the_pruned_model_comes_nearer_and_the_dense_one_stays() -> None:
    net, inputs = network("convolutions")
    before = copy.deepcopy(state(net))
    graph = depgraph.trace(net, inputs[:2])
    group = next(g for g in graph.prunable if g.size == 8)
    plan = graph.plan({group.name: [0, 2, 3, 5, 7]})
    raw, refitted = plan.apply(net), plan.apply(net)
    compensate(net, refitted, plan, batches(inputs))
    wanted, was, now = (m(inputs).detach() for m in (net, raw, refitted))
    assert (now - wanted).norm() < 0.9 * (was - wanted).norm()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(net).items())


def test_without_compensation_statistics_are_those_of_the_units_that_stay() -> None:
    net, x, _ = net_and_plan()
    small, plan = pruners.prune(net, x[:2], "l2", 0.3, batches=batches(x), compensate=False)
    for name in ("1.running_var", "6.running_var"):
        kept = plan.kept_buffers.get(name, {}).get(0, slice(None))
        assert torch.equal(small.get_buffer(name), net.get_buffer(name)[kept])
