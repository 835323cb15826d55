from __future__ import annotations

import torch
from torch import nn

import depgraph
import pruners
from tests.depgraph.models import images, tiny
from tests.pruners.networks import batches, network


def test_wanda_and_flap_weigh_the_columns_that_read_a_unit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(12, 3)
    graph = depgraph.trace(net, x[:2])
    hidden = net[1](net[0](x)).double().detach()
    weight = net[2].weight.double().detach()
    wanda = pruners.score(net, graph, "wanda", batches(x))["hidden"]
    expected = weight.abs().sum(0) * hidden.square().mean(0).sqrt()
    torch.testing.assert_close(wanda, expected, rtol=1e-5, atol=0)
    flap = pruners.score(net, graph, "flap", batches(x))["hidden"]
    expected = weight.square().sum(0) * hidden.var(0, correction=0)
    torch.testing.assert_close(flap, expected, rtol=1e-5, atol=0)


def test_all_columns_of_a_head_count_over_all_tokens() -> None:
    model = tiny()
    seen: list[torch.Tensor] = []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images(12))
    norms = seen[0].detach().double().square().mean((0, 1)).sqrt()
    columns = model.blocks[1].attn.proj.weight.detach().double().abs().sum(0) * norms
    graph = depgraph.trace(model, images())
    heads = pruners.score(model, graph, "wanda", batches(images(12)))["blocks.1.attn.heads"]
    torch.testing.assert_close(heads, columns.view(4, 12).sum(1), rtol=1e-5, atol=0)


def test_a_convolutions_columns_are_weighed_by_channel() -> None:
    model, inputs = network("convolutions")
    graph = depgraph.trace(model, inputs[:2])
    before = model[:6](inputs).detach().double()
    weight = model[6].weight.detach().double()
    norms = before.square().mean((0, 2, 3)).sqrt()
    group = next(g for g in graph.prunable if g.size == 8)
    found = pruners.score(model, graph, "wanda", batches(inputs))[group.name]
    torch.testing.assert_close(found, weight.abs().sum((0, 2, 3)) * norms, rtol=1e-5, atol=0)


def test_a_unit_that_never_changes_goes_first_by_flap() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = 100
        net[2].weight[:, 2] = 10
    x = torch.randn(12, 3)
    graph = depgraph.trace(net, x[:2])
    assert pruners.score(net, graph, "flap", batches(x))["hidden"].argmin() == 2
    assert pruners.score(net, graph, "wanda", batches(x))["hidden"].argmax() == 2
