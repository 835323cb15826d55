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
