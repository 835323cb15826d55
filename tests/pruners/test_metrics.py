from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
import pruners
from pruners.statistics.units import reduce_others, sum_over_members
from tests.depgraph.models import images, tiny
from tests.pruners.networks import gated


def batches(samples: int = 12, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(samples) % 10
    return list(zip(images(samples).split(batch), labels.split(batch), strict=True))


@pytest.fixture(params=["vit_base_patch16_224", "beit_base_patch16_224"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(request.param)


def test_l1_and_l2_add_up_every_member_of_a_unit() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = depgraph.trace(net, torch.randn(2, 3))
    for unit in range(4):
        parts = [net[0].weight[unit], net[0].bias[unit : unit + 1], net[2].weight[:, unit]]
        values = torch.cat(parts).double()
        l1 = pruners.score(net, graph, "l1")["hidden"][unit]
        l2 = pruners.score(net, graph, "l2")["hidden"][unit]
        torch.testing.assert_close(l1, values.abs().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(l2, values.norm(), rtol=1e-5, atol=0)


def test_l2_of_a_head_counts_its_q_k_v_biases_tables_and_projection() -> None:
    net = tiny("beit_base_patch16_224")
    attention = net.blocks[0].attn
    own = slice(12, 24)  # head 1 of 4, 12 wide
    parts = [
        attention.qkv.weight.view(3, 4, 12, 48)[:, 1],
        attention.q_bias[own],
        attention.v_bias[own],
        attention.relative_position_bias_table[:, 1],
        attention.proj.weight[:, own],
    ]
    expected = sum(part.double().square().sum() for part in parts) ** 0.5
    graph = depgraph.trace(net, images())
    found = pruners.score(net, graph, "l2")["blocks.0.attn.heads"][1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_random_depends_on_its_seed_alone(model: nn.Module) -> None:
    graph = depgraph.trace(model, images())
    state = torch.get_rng_state()
    first = pruners.score(model, graph, "random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again = pruners.score(model, graph, "random", seed=3)
    other = pruners.score(model, graph, "random", seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed"], other["embed"])


def _gated_loss(model: nn.Module, group: depgraph.Group, gate: Tensor) -> Tensor:
    """Mean loss of the model with all parameters of each unit multiplied by its gate."""
    state = gated(model, group, gate)
    total = torch.zeros((), dtype=gate.dtype)
    for inputs, targets in batches():
        output = torch.func.functional_call(model, state, (inputs.to(gate.dtype),))
        total = total + F.cross_entropy(output, targets, reduction="sum")
    return total / 12


def test_taylor_is_the_gradient_of_a_gate_on_the_unit(model: nn.Module) -> None:
    graph = depgraph.trace(model, images())
    scores = pruners.score(model, graph, "taylor", batches())
    precise = copy.deepcopy(model).double()
    for group in graph.prunable:
        gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(_gated_loss(precise, group, gate), gate)
        torch.testing.assert_close(scores[group.name], gradient.abs(), rtol=1e-2, atol=1e-5)


def test_hessian_is_the_sum_of_squared_per_sample_gradients(model: nn.Module) -> None:
    graph = depgraph.trace(model, images())
    scores = pruners.score(model, graph, "hessian", batches(), num_samples=6)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    inputs, targets = images(12)[:6], torch.arange(6)
    for i in range(6):
        loss = F.cross_entropy(model(inputs[i : i + 1]), targets[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            if grad is not None:
                squares[name] += grad**2
    weights = dict(model.named_parameters())
    expected = sum_over_members(
        graph, lambda name, dim: reduce_others(weights[name] ** 2 * squares[name], dim) / 12
    )
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-3, atol=1e-9)


def _trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that has learnt to tell eight noisy clusters apart."""
    torch.manual_seed(0)
    centres = torch.randn(8, 16) * 2
    labels = torch.arange(512) % 8
    inputs = centres[labels] + torch.randn(512, 16)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimiser.step()
    return net, inputs, labels


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_hessian_ranks_units_like_the_measured_rise_of_the_loss() -> None:
    net, inputs, labels = _trained()
    graph = depgraph.trace(net, inputs[:2])
    data = [(inputs, labels)]
    scores = pruners.score(net, graph, "hessian", data, num_samples=512)["hidden"]
    with torch.no_grad():
        before = F.cross_entropy(net(inputs), labels)
        rises = []
        for unit in range(24):
            off = copy.deepcopy(net)
            off[2].weight[:, unit] = 0
            rises.append(F.cross_entropy(off(inputs), labels) - before)
    measured = torch.stack(rises)
    correlation = torch.corrcoef(torch.stack([_ranks(scores), _ranks(measured)]))[0, 1]
    assert correlation > 0.4
    random = pruners.score(net, graph, "random", data)["hidden"]
    assert correlation > torch.corrcoef(torch.stack([_ranks(random), _ranks(measured)]))[0, 1]


def test_scores_do_not_depend_on_how_samples_are_batched(model: nn.Module) -> None:
    graph = depgraph.trace(model, images())
    for metric in ("taylor", "hessian"):
        one = pruners.score(model, graph, metric, batches(12, 12))
        many = pruners.score(model, graph, metric, batches(12, 5)[:3])
        for name, values in one.items():
            torch.testing.assert_close(many[name], values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", ["taylor", "hessian"])
def test_scoring_leaves_the_model_as_it_was(metric: str) -> None:
    model = tiny(drop_path_rate=0.3).train()
    model.blocks[0].eval()
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    graph = depgraph.trace(model, images())
    first = pruners.score(model, graph, metric, batches())
    assert model.training and not model.blocks[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in model.blocks[1].parameters())
    assert all(torch.equal(model.state_dict()[name], was) for name, was in before.items())
    model.requires_grad_(True)
    again = pruners.score(model, graph, metric, batches())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_loss_that_is_not_finite_is_refused_and_the_mode_restored() -> None:
    model = tiny().train()
    with torch.no_grad():
        model.head.weight.fill_(1e38)
    graph = depgraph.trace(model, images())
    with pytest.raises(depgraph.DepgraphError, match="not finite"):
        pruners.score(model, graph, "taylor", batches())
    assert model.training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs data"),
        ([], "hold no sample"),
        ([images(2)], "pair"),
        ([(images(2), torch.zeros(3))], "as many inputs as targets"),
        ([(images(2), torch.tensor([0, 10]))], "has 10 classes"),
    ],
)
def test_data_of_the_wrong_form_is_refused(data: object, message: str) -> None:
    model = tiny()
    graph = depgraph.trace(model, images())
    with pytest.raises(depgraph.DepgraphError, match=message):
        pruners.score(model, graph, "taylor", data)  # type: ignore[arg-type]


def test_fewer_samples_than_asked_for_are_refused() -> None:
    model = tiny()
    graph = depgraph.trace(model, images())
    with pytest.raises(depgraph.DepgraphError, match="hold 12 samples"):
        pruners.score(model, graph, "hessian", batches(), num_samples=13)
