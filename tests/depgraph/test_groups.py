from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import depgraph
from depgraph.coupling.propagate import RULES
from tests.depgraph.models import WrittenOut, images, tiny
from tests.reference import masked, relative_difference

NAMES = ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "beit_base_patch16_224"]


@pytest.mark.parametrize("name", NAMES)
def test_a_base_model_has_one_embed_and_three_groups_for_each_block(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    graph = depgraph.trace(model, torch.empty(1, 3, 224, 224, device="meta"))
    kinds = Counter((group.kind, group.size) for group in graph.prunable)
    assert kinds == {
        ("embed", 768): 1,
        ("heads", 12): 12,
        ("head_dim", 64): 12,
        ("hidden", 3072): 12,
    }
    expected = {f"blocks.{i}.{x}" for i in range(12) for x in ("attn.heads", "attn.head_dim")}
    expected |= {f"blocks.{i}.mlp.hidden" for i in range(12)} | {"embed"}
    assert {group.name for group in graph.prunable} == expected


def test_names_are_unique_and_every_frozen_group_has_a_reason() -> None:
    groups = depgraph.trace(tiny(), images()).groups
    assert len({group.name for group in groups}) == len(groups)
    assert all(group.frozen for group in groups if group.kind == "fixed")


def _member_of(model: nn.Module, parameter: str) -> set[tuple[str, int]]:
    return {
        (group.name, member.dim)
        for group in depgraph.trace(model, images()).prunable
        for member in (*group.members, *group.buffers)
        if member.parameter == parameter
    }


def test_tables_biases_and_layer_scales_of_beit_are_members() -> None:
    model = tiny("beit_base_patch16_224")
    heads, head_dim = "blocks.0.attn.heads", "blocks.0.attn.head_dim"
    assert _member_of(model, "blocks.0.attn.relative_position_bias_table") == {(heads, 1)}
    for bias in ("q_bias", "k_bias", "v_bias"):
        assert _member_of(model, f"blocks.0.attn.{bias}") == {(heads, 0), (head_dim, 0)}
    assert _member_of(model, "blocks.0.gamma_1") == {("embed", 0)}


@pytest.mark.parametrize(
    ("parameter", "dim", "reason"),
    [
        ("head.weight", 0, "output"),
        ("pos_embed", 1, "joined"),
        ("patch_embed.proj.weight", 1, "dimension 1 of the model's input"),
        ("patch_embed.proj.weight", 2, "kernel"),
    ],
)
def test_what_the_task_fixes_is_frozen_with_its_reason(
    parameter: str, dim: int, reason: str
) -> None:
    for group in depgraph.trace(tiny(), images()).groups:
        if any((m.parameter, m.dim) == (parameter, dim) for m in group.members):
            assert group.frozen is not None and reason in group.frozen
            return
    pytest.fail(f"no group holds dimension {dim} of {parameter}")


def test_positions_of_a_head_are_its_rows_in_q_k_and_v() -> None:
    group = depgraph.trace(tiny(), images()).group("blocks.0.attn.heads")
    member = next(m for m in group.members if m.parameter == "blocks.0.attn.qkv.weight")
    rows = [part * 48 + 2 * 12 + i for part in range(3) for i in range(12)]
    assert member.positions[2].tolist() == rows
    assert member.place == "3 x heads x head_dim"


def test_unfused_attention_has_the_same_groups() -> None:
    fused, unfused = tiny(), tiny()
    for block in unfused.blocks:
        block.attn.fused_attn = False
    assert depgraph.trace(fused, images()).groups == depgraph.trace(unfused, images()).groups


def test_meaning_comes_from_the_graph_not_from_names() -> None:
    kinds = {g.kind: g.size for g in depgraph.trace(WrittenOut(), torch.randn(2, 5, 24)).prunable}
    assert kinds == {"heads": 4, "head_dim": 6}


@pytest.mark.parametrize("rank", [0, 4])
def test_hidden_units_stay_hidden_beside_a_low_rank_adapter(rank: int) -> None:
    """A sum of two layers of one input is no residual stream, wherever the model adds besides."""

    class Layer(nn.Module):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__()
            self.base = nn.Linear(inner, outer)
            if rank:
                self.down, self.up = nn.Linear(inner, rank), nn.Linear(rank, outer)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x)
            return y + self.up(self.down(x)) if rank else y

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = Layer(16, 48), Layer(48, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc2(self.fc1(x).relu())
            return x.clone() + y

    model = nn.Sequential(nn.Linear(6, 16), Block(), Block(), nn.Linear(16, 3))
    found = [(g.kind, g.size) for g in depgraph.trace(model, torch.randn(2, 6)).prunable]
    adapters = [("hidden", rank)] * 4 if rank else []
    assert sorted(found) == sorted([("embed", 16), ("hidden", 48), ("hidden", 48), *adapters])


def test_an_op_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.renorm(self.a(x), 2, 0, 1.0)).relu())

    groups = depgraph.trace(Odd(), torch.randn(3, 4)).groups
    around = [g for g in groups if g.frozen and "no rule for the op aten.renorm" in g.frozen]
    assert [g.size for g in around] == [6, 6]
    assert all("(test_groups.py, line " in str(g.frozen) for g in around)
    assert [g.size for g in groups if g.frozen is None] == [5]


def test_a_users_rule_frees_what_an_unknown_op_froze() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).logcumsumexp(1))

    model, x = Running(), torch.randn(3, 5, 4)
    assert not depgraph.trace(model, x).prunable

    @depgraph.rule("aten.logcumsumexp")
    def running_sum(p: Any, op: Any) -> Any:
        source, dim = op.args[:2]
        p.freeze(source, "a running sum over this dim", [dim])
        return p.axes(source)

    try:
        graph = depgraph.trace(model, x)
        plan = graph.plan({"hidden": [1, 2, 4]})
        assert relative_difference(plan.apply(model)(x), masked(model, plan)(x)) < 1e-5
    finally:
        RULES.pop("aten.logcumsumexp")


def test_a_softmax_over_channels_and_a_mean_over_them_keep_them_whole() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.c = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).softmax(-1)) + self.c(x).mean(-1, keepdim=True)

    assert depgraph.trace(Mixed(), torch.randn(3, 4)).prunable == ()


def test_a_rule_from_user_code_is_used() -> None:
    own = RULES["aten.cumsum"]

    @depgraph.rule("aten.cumsum")
    def carried(p, node):  # type: ignore[no-untyped-def]
        return p.axes(node.args[0])

    try:
        model = nn.Sequential(nn.Linear(4, 6), _Running(), nn.Linear(6, 2))
        assert [g.size for g in depgraph.trace(model, torch.randn(3, 4)).prunable] == [6]
    finally:
        RULES["aten.cumsum"] = own


class _Running(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)
