"""What may be cut of a sum of two activations: only what vanishes with its units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from tests.reference import randomise
from tests.trial import Failure, try_model

Map = Callable[[Tensor], Tensor]


class LinearAttention(nn.Module):
    """``phi(q) (phi(k)^T v)``: the features are summed over."""

    def __init__(self, phi: Map) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 6)
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.phi(self.q(x)), self.phi(self.k(x)), self.v(x)
        return self.out(q @ (k.transpose(1, 2) @ v))


class Product(nn.Module):
    """A sum over the channels of two layers."""

    def __init__(self, total: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.y, self.z = nn.Linear(6, 8), nn.Linear(6, 8)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return x * self.total(self.y(x), self.z(x))


def inputs() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).double()


def summed_group(model: nn.Module, parameter: str) -> depgraph.Group:
    graph = depgraph.trace(model.double().eval(), inputs())
    return next(g for g in graph.groups if any(m == (parameter, 0) for m in _places(g)))


def _places(group: depgraph.Group) -> list[tuple[str, int]]:
    return [(member.parameter, member.dim) for member in group.members]


def exact(model: nn.Module) -> None:
    model = randomise(model).double().eval()
    for seed in range(4):
        try_model(model, inputs()[:2], inputs(), seed)


@pytest.mark.parametrize(
    "phi",
    [
        F.relu,
        F.silu,
        torch.tanh,
        torch.square,
        lambda x: x,
        lambda x: F.normalize(x, dim=-1),
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: 2 * x.abs().sqrt() - x,
        lambda x: x.clamp(-1, 1) * (x + 1).sigmoid(),
        lambda x: x.masked_fill(x > 1, 0.0),
    ],
)
def test_features_that_are_zero_at_zero_may_be_cut(phi: Map):
    assert summed_group(LinearAttention(phi), "q.weight").frozen is None
    exact(LinearAttention(phi))


@pytest.mark.parametrize(
    "phi",
    [
        lambda x: F.elu(x) + 1,
        torch.sigmoid,
        torch.exp,
        torch.cos,
        lambda x: x.softmax(1),
        lambda x: x.clamp(min=0.1),
        lambda x: x.masked_fill(x > 1, 3.0),
        lambda x: (x + 1) * 2,
        lambda x: x.clone().add_(1),
    ],
)
def test_features_that_are_not_zero_at_zero_stay_whole_and_say_why(phi: Map):
    group = summed_group(LinearAttention(phi), "q.weight")
    assert group.frozen == (
        "aten.matmul sums over it, and what it sums does not vanish with its units"
    )
    assert summed_group(LinearAttention(phi), "v.weight").frozen is None
    exact(LinearAttention(phi))


@pytest.mark.parametrize(
    "total",
    [
        lambda y, z: (y.sigmoid() * z).sum(-1, keepdim=True),
        lambda y, z: torch.einsum("bnc,bnc->bn", y.exp(), z)[..., None],
        lambda y, z: torch.linalg.vector_norm(y * z.cos(), dim=-1, keepdim=True),
        lambda y, z: (torch.cat([y, z], -1).unflatten(-1, (2, 8)).sum(2) ** 2).sum(-1, True),
        lambda y, z: (torch.stack([y.exp(), z], 2).select(2, 1)).sum(-1, keepdim=True),
        lambda y, z: (y / (1 + z.square())).sum(-1, keepdim=True),
    ],
)
def test_one_factor_that_vanishes_is_enough(total: Callable[[Tensor, Tensor], Tensor]):
    model = Product(total)
    exact(model)
    if "stack" not in total.__code__.co_names:  # a stack vanishes only with all of its parts
        assert summed_group(model, "z.weight").frozen is None


@pytest.mark.parametrize(
    "total",
    [
        lambda y, z: (y + z.cos()).sum(-1, keepdim=True),
        lambda y, z: (y.sigmoid() * z.cos()).sum(-1, keepdim=True),
        lambda y, z: torch.where(y > 0, y, z + 1).sum(-1, keepdim=True),
        lambda y, z: (y - y.mean(1, keepdim=True) + z.amax(dim=(1, 2), keepdim=True)).sum(-1, True),
    ],
)
def test_a_sum_with_something_that_stays_freezes(total: Callable[[Tensor, Tensor], Tensor]):
    assert "does not vanish" in str(summed_group(Product(total), "y.weight").frozen)
    exact(Product(total))


def written_through_a_view(y: Tensor, z: Tensor) -> Tensor:
    y[:, 1:].add_(1.0)
    return (y * z.cos()).sum(-1, keepdim=True)


def scaled_through_a_view(y: Tensor, z: Tensor) -> Tensor:
    y[:, 1:].mul_(z[:, 1:].cos())
    return y.sum(-1, keepdim=True)


def test_what_is_written_through_a_view_counts():
    assert summed_group(Product(written_through_a_view), "y.weight").frozen
    exact(Product(written_through_a_view))
    assert summed_group(Product(scaled_through_a_view), "y.weight").frozen is None
    exact(Product(scaled_through_a_view))


def test_a_bias_in_a_norm_between_heads_and_their_product_freezes_heads_only():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.norm = nn.Linear(6, 8), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            q = self.norm(self.q(x).unflatten(-1, (2, 4)))
            return x * q.sum((-1, -2))[..., None]

    groups = {g.size: g for g in depgraph.trace(Heads(), torch.randn(3, 5, 6)).groups}
    assert "does not vanish" in str(groups[2].frozen)
    assert groups[4].frozen is None
    exact(Heads())


def test_the_judge_would_notice_a_sum_that_is_not_frozen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("depgraph.coupling.alongside.freeze_mixed_sums", lambda p: None)
    with pytest.raises(Failure, match="differs by"):
        exact(LinearAttention(torch.sigmoid))
