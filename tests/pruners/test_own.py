from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from tests.depgraph.models import images, tiny
from tests.reference import masked, relative_difference


def split_over_heads() -> nn.Module:
    """Heads whose large dims lie at other places: head 0 has the first half, head 1 the second."""
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            weight, bias = block.attn.qkv.weight.view(3, 4, 12, -1), block.attn.qkv.bias
            for head in range(4):
                unused = slice(6, 12) if head % 2 == 0 else slice(0, 6)
                weight[:, head, unused] = 0
                bias.view(3, 4, 12)[:, head, unused] = 0
    return model


def by_heads(kept: Tensor) -> list[list[int]]:
    """Rows kept of the first third of a qkv weight, as head dims of each head."""
    rows = kept[: len(kept) // 3]
    return [[int(row) % 12 for row in rows if int(row) // 12 == head] for head in range(4)]


@pytest.mark.parametrize("metric", ["l1", "l2", "taylor", "hessian", "obs"])
def test_each_head_keeps_the_dims_it_uses(metric: str) -> None:
    model = split_over_heads()
    batches = [(images(16), torch.zeros(16, dtype=torch.long))]
    small, plan = pruners.prune(
        model,
        images(),
        metric,
        0.5,
        scope="uniform",
        per="unit",
        kinds="head_dim",
        batches=batches,
        compensate=False,
        per_head=True,
    )
    expected = [list(range(6)) if head % 2 == 0 else list(range(6, 12)) for head in range(4)]
    assert by_heads(plan.kept["blocks.0.attn.qkv.weight"][0]) == expected
    assert relative_difference(small(images()), model(images())) < 1e-4
    assert relative_difference(small(images()), masked(model, plan)(images())) < 1e-4


def test_own_dims_are_refused_where_directions_are_turned_anyway() -> None:
    batches = [(images(4), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(depgraph.DepgraphError, match="per_head"):
        pruners.prune(tiny(), images(), batches=batches, per_head=True)


@torch.no_grad()
@pytest.mark.parametrize("per_head", [False, True])
def test_separate_head_dims_give_a_plan_for_the_original(per_head: bool) -> None:
    model = tiny()
    small, plan = pruners.prune(model, images(), "l2", 0.5, separate=True, per_head=per_head)
    counts = [len(plan.kept_units[f"blocks.0.attn{part}.head_dim"]) for part in ("", ".qkv")]
    assert counts[0] != counts[1]
    assert relative_difference(small(images()), masked(model, plan)(images())) < 1e-4
    assert torch.equal(plan.apply(model)(images()), small(images()))


def test_a_compensated_cut_with_separate_head_dims_runs_and_is_as_planned() -> None:
    model = tiny()
    batches = [(images(32), torch.zeros(32, dtype=torch.long))]
    small, plan = pruners.prune(
        model, images(), "obs", target={"macs": 0.5}, kinds="auto", batches=batches, separate=True
    )
    assert sum(p.numel() for p in small.parameters()) == plan.num_params
    wanted, cut = model(images(32)), plan.apply(model)(images(32))
    assert (small(images(32)) - wanted).norm() < (cut - wanted).norm()
