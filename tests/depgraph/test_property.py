"""Random networks and random plans; and networks that once failed, each kept as a small module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from depgraph.coupling.axes import Atom, Axis, axis_size
from tests.networks import KINDS, Network
from tests.reference import masked_output, randomise, relative_difference
from tests.trial import Failure, examine, try_model, try_network

SEEDS = [*range(100), 1106]
"""None of these networks is wrong or refused; more of them by `python -m benchmarks.property`. The
last has an attention whose result torch lays out in another way under autocast."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_computes_the_masked_original_at_any_call(seed: int):
    outcome = examine(Network.random(seed), seed)
    assert not outcome.findings, f"{outcome.worst}\n{Network.random(seed).source()}"
    assert outcome.checks > 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_can_be_pruned_alone(kind: str):
    networks = [Network("tokens", ((kind, seed),), seed) for seed in range(12)]
    assert any(examine(network).prunable for network in networks)


def test_a_network_is_the_same_whenever_it_is_written():
    assert Network.random(7).source() == Network.random(7).source()
    assert Network.random(7).source() != Network.random(8).source()


class Between(nn.Module):
    """Some computation between a layer of 12 channels and another."""

    def __init__(self, compute: Callable[[Tensor], Tensor], outer: int = 12) -> None:
        super().__init__()
        self.inner = _Computes(compute, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Computes(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor], outer: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(outer, 3)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.compute(self.a(x)))


def tried(compute: Callable[[Tensor], Tensor], outer: int = 12) -> int:
    """Prune the computation by several plans; how many groups can be pruned."""
    model = randomise(Between(compute, outer)).double().eval()
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    return min(try_model(model, x[:2], x, seed).prunable for seed in range(6))


def norm_of_a_stated_number_of_groups(x: Tensor) -> Tensor:
    return F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)


def range_whose_start_moves(x: Tensor) -> Tensor:
    return torch.cat([x[..., :2], x[..., 2:6].tanh(), x[..., 6:]], dim=-1)


class _Slopes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.PReLU(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.slopes(x.mT).mT


ONCE_FAILED = {
    "sizes of unflatten": (lambda x: x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2), 12),
    "unflatten in the middle": (lambda x: x.mT.unflatten(1, (3, 4)).sum(2).mT, 3),
    "a narrow becomes a slice": (lambda x: x.narrow(-1, 4, 8), 8),
    "transpose of many matrices": (lambda x: x.mT.mT, 12),
    "groups that still fit": (norm_of_a_stated_number_of_groups, 12),
    "a range of the same length elsewhere": (range_whose_start_moves, 12),
    "a start counted from the end": (lambda x: x[..., -5:], 5),
    "every second channel": (lambda x: x[..., 1::2], 6),
    "slopes along dimension 1": (_Slopes(), 12),
    "sizes in a layer without parameters": (
        nn.Sequential(nn.Unflatten(-1, (3, 4)), nn.GELU(), nn.Flatten(-2)),
        12,
    ),
    "normalized shape of a function": (lambda x: F.rms_norm(x, (12,)), 12),
}


@pytest.mark.parametrize("name", ONCE_FAILED)
def test_what_once_failed_is_exact_and_still_prunable(name: str):
    compute, outer = ONCE_FAILED[name]
    assert tried(compute, outer) > 0


class _CutAndAdded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[..., :12] + x


def test_a_wrong_size_that_broadcasts_is_found_where_it_arises():
    model = nn.Sequential(nn.Linear(5, 12), _CutAndAdded(), nn.Linear(12, 3)).double().eval()
    graph = depgraph.trace(model, torch.randn(2, 4, 5).double())
    kept = {g.name: [0] if g.size == 12 else [0, 1] for g in graph.prunable}
    small = graph.plan(kept).apply(model)
    x = torch.randn(3, 4, 5).double()
    expected = masked_output(model, graph, graph.plan(kept), x)
    assert relative_difference(small(x), expected) < 1e-9


class _Unruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.logcumsumexp(self.a(x), dim=1)
        x = self.b(x).reshape(x.shape[0], 4, 2, 4).flatten(2)
        return self.c(x)


def test_a_generated_forward_behind_an_op_without_a_rule_takes_any_batch():
    model = randomise(nn.Sequential(_Unruled())).double().eval()
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    assert all(try_model(model, x[:2], x, seed).prunable == 2 for seed in range(6))


class _Decides(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x * 2 if x.shape[-1] > 32 else x)
        return y


def test_a_table_that_another_size_takes_whole_is_no_difference() -> None:
    blocks = (("alibi", 53543), ("switch", 44971), ("rotary", 43768))
    network = Network("image", blocks, 780)
    model = randomise(_Decides(network.build())).double().eval()
    assert try_model(model, network.example(2), network.example(3), 262).prunable > 2


def test_a_trial_notices_a_wrong_index(monkeypatch: pytest.MonkeyPatch):
    from depgraph.slicing import slicer

    right = slicer.kept_indices

    def neighbours(axis: Axis, kept: dict[Atom, Tensor]) -> Tensor:
        return (right(axis, kept) + 1) % axis_size(axis)

    monkeypatch.setattr(slicer, "kept_indices", neighbours)
    with pytest.raises(Failure, match="differs by"):
        try_network(Network("tokens", (("mlp", 1), ("attention", 2))), 4)
