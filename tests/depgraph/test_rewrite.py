"""A rewritten forward is right at every size, type and mode; each network here forces one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from tests.reference import masked, randomise, relative_difference


class Sized(nn.Module):
    """Spells out the width of its hidden units, so that no attribute can say another one."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)
        self.compute = compute
        self.mask = torch.arange(60.0).reshape(5, 12).cos()[:, :1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(x.shape[0], x.shape[1], 3, 4).tanh().flatten(2)
        return self.b(self.compute(x, y))


def by_size(x: Tensor, y: Tensor) -> Tensor:
    B, N, _ = x.shape
    y = y / N + y.sum(1, keepdim=True) / (B * N) + math.log(N) * y[:, N - 1 :] + y / len(x)
    return y * torch.eye(B, dtype=y.dtype).sum() + y / x.numel() if B > 1 else y * int(N**0.5)


def by_type(x: Tensor, y: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return (y.float() * 2).to(x.dtype) + steps * (2 if x.dtype == torch.float64 else 3)


def by_gradients(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = y.amax(1, keepdim=True)
    return y * scale * (2 if torch.is_grad_enabled() else 3)


def by_parts(x: Tensor, y: Tensor) -> Tensor:
    half = x.shape[1] // 2
    first, second = y.split([half, x.shape[1] - half], 1)
    return torch.cat([second, first.roll(half // 2, 1)], 1)[:, [0, *range(1, x.shape[1])]]


def by_loop(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([sample * (i + 1) for i, sample in enumerate(y)])


KINDS = (by_size, by_type, by_gradients, by_parts, by_loop)


def pruned(compute: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, nn.Module]:
    """The sliced network, and the original with the removed units off."""
    model = randomise(Sized(compute)).double().eval()
    graph = depgraph.trace(model, torch.randn(2, 6, 8).double())
    assert graph.prunable
    plan = graph.plan({group.name: range(group.size - 1) for group in graph.prunable})
    small = plan.apply(model)
    assert "depgraph_rewrite" in vars(type(small))
    return small, masked(model, plan)


@pytest.mark.parametrize("compute", KINDS)
def test_a_rewritten_forward_is_right_at_every_size(compute) -> None:
    small, expected = pruned(compute)
    for batch, tokens in ((2, 6), (1, 6), (3, 6), (2, 9), (5, 7), (1, 2)):
        x = torch.randn(batch, tokens, 8).double()
        assert relative_difference(small(x), expected(x)) < 1e-9


@pytest.mark.parametrize("compute", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rewritten_forward_is_right_in_other_types(compute, dtype) -> None:
    small, expected = (network.to(dtype) for network in pruned(compute))
    x = torch.randn(3, 6, 8).to(dtype)
    got, wanted = small(x), expected(x)
    assert got.dtype == wanted.dtype
    assert relative_difference(got.double(), wanted.double()) < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("compute", KINDS)
def test_a_rewritten_forward_is_right_under_autocast(compute) -> None:
    small, expected = (network.float() for network in pruned(compute))
    x = torch.randn(3, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = small(x), expected(x)
    assert got.dtype == wanted.dtype
    assert relative_difference(got.double(), wanted.double()) < 0.1


@pytest.mark.parametrize("compute", KINDS)
def test_gradients_are_those_of_the_original(compute) -> None:
    small, expected = pruned(compute)
    x = torch.randn(3, 6, 8).double()
    for network in (small, expected):
        network.train()(x).square().sum().backward()
    assert torch.allclose(small.b.bias.grad, expected.b.bias.grad)
    assert torch.is_grad_enabled()


def test_calls_of_other_sizes_from_several_threads_are_right() -> None:
    small, expected = pruned(by_size)
    inputs = [torch.randn(1 + i % 3, 2 + i, 8).double() for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: small(x).detach(), inputs))
    for x, result in zip(inputs, results, strict=True):
        assert relative_difference(result, expected(x)) < 1e-9


def test_a_forward_that_a_tracer_sees_keeps_its_batch_open() -> None:
    small, expected = pruned(lambda x, y: y + F.gelu(y) * x.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated
        traced = torch.jit.trace(small, torch.randn(2, 6, 8).double())
    x = torch.randn(5, 6, 8).double()
    assert relative_difference(traced(x), expected(x)) < 1e-9


def test_a_tensor_held_in_an_attribute_is_the_one_of_the_moment() -> None:
    class Held(Sized):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).view(x.shape[0], x.shape[1], 3, 4).tanh().flatten(2)
            return self.b(y * self.mask.to(y.dtype))

    model = randomise(Held(by_size)).double().eval()
    x = torch.randn(2, 5, 8).double()
    graph = depgraph.trace(model, x)
    plan = graph.plan({group.name: range(group.size - 1) for group in graph.prunable})
    small, expected = plan.apply(model), masked(model, plan)
    small.mask = expected.mask = torch.randn(5, 1)
    assert relative_difference(small(x), expected(x)) < 1e-9


def test_a_rate_and_a_switch_are_those_of_the_moment() -> None:
    class Dropping(Sized):
        def __init__(self) -> None:
            super().__init__(by_size)
            self.drop, self.doubled = nn.Dropout(0.5), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).view(x.shape[0], x.shape[1], 3, 4).tanh().flatten(2)
            y = F.dropout(y, self.drop.p, self.training)
            return self.b(y * 2 if self.doubled else y)

    model = randomise(Dropping()).double()
    x = torch.randn(2, 5, 8).double()
    graph = depgraph.trace(model, x)
    plan = graph.plan({group.name: range(group.size - 1) for group in graph.prunable})
    small, expected = plan.apply(model), masked(model, plan)
    assert not torch.equal(small(x), small(x))
    for network in (small, expected):
        network.drop.p, network.doubled = 0.0, True
    assert relative_difference(small(x), expected(x)) < 1e-9


def test_what_a_call_couples_that_the_trace_did_not_is_refused() -> None:
    def coupled(x: Tensor, y: Tensor) -> Tensor:
        return y if x.shape[:2] != (4, 9) else y.flip(-1)  # at sizes that are not tried

    small, _ = pruned(coupled)
    with pytest.raises(depgraph.DepgraphError, match="couples units here"):
        small(torch.randn(4, 9, 8).double())
