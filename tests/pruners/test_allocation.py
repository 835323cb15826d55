from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import depgraph
import pruners
from tests.depgraph.models import images, tiny

GRAPH = depgraph.trace(tiny(), images())
TOTAL = sum(group.size for group in GRAPH.prunable)


def scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) + 0.1 for g in GRAPH.prunable}


@given(st.floats(0.02, 0.95), st.integers(0, 50))
def test_the_number_removed_is_the_ratio_of_all_units(ratio: float, seed: int) -> None:
    kept = pruners.allocate(GRAPH, scores(seed), ratio=ratio, floor=0.0)
    assert TOTAL - sum(map(len, kept.values())) == round(ratio * TOTAL)
    assert all(len(units) >= 1 for units in kept.values())


@given(st.floats(0.1, 0.9), st.integers(2, 8), st.integers(1, 4))
def test_kept_counts_are_multiples_and_at_least_the_minimum(
    ratio: float, step: int, least: int
) -> None:
    kept = pruners.allocate(GRAPH, scores(), ratio=ratio, round_to=step, min_units=least)
    for group in GRAPH.prunable:
        count = len(kept[group.name])
        assert count == group.size or count % step == 0
        assert count >= min(least, group.size)
    removed = TOTAL - sum(map(len, kept.values()))
    assert abs(removed - ratio * TOTAL) <= step or removed < ratio * TOTAL


@given(st.floats(0.1, 0.8), st.floats(0.01, 0.15))
def test_a_higher_ratio_removes_what_a_lower_one_does_and_more(low: float, more: float) -> None:
    few = pruners.allocate(GRAPH, scores(), ratio=low)
    many = pruners.allocate(GRAPH, scores(), ratio=low + more)
    assert all(set(many[name].tolist()) <= set(few[name].tolist()) for name in few)


def test_the_units_that_stay_are_the_best_of_their_group() -> None:
    values = scores()
    for name, units in pruners.allocate(GRAPH, values, ratio=0.5).items():
        gone = sorted(set(range(len(values[name]))) - set(units.tolist()))
        assert not gone or values[name][units].min() >= values[name][gone].max()


def test_scores_of_one_group_on_another_scale_change_nothing() -> None:
    values = scores()
    scaled = {**values, "embed": values["embed"] * 1000}
    one, other = (pruners.allocate(GRAPH, v, ratio=0.5) for v in (values, scaled))
    assert all(torch.equal(one[name], other[name]) for name in one)
    free = pruners.allocate(GRAPH, scaled, ratio=0.5, normalise="none")
    assert len(free["embed"]) == 48


def test_the_floor_keeps_a_group_of_equal_scores_from_being_emptied() -> None:
    values = {**scores(), "embed": torch.full((48,), 1.0)}
    emptied = pruners.allocate(GRAPH, values, ratio=0.8, floor=0.0)
    held = pruners.allocate(GRAPH, values, ratio=0.8, floor=0.5)
    assert len(emptied["embed"]) == 1
    assert len(held["embed"]) == pytest.approx(0.5 * 0.2 * 48, abs=1)


def test_uniform_takes_the_same_share_of_every_group() -> None:
    kept = pruners.allocate(GRAPH, scores(), ratio=0.5, scope="uniform")
    assert all(len(kept[g.name]) == g.size - round(g.size / 2) for g in GRAPH.prunable)


def test_isomorphic_takes_the_same_share_of_every_kind() -> None:
    kept = pruners.allocate(GRAPH, scores(), ratio=0.5, scope="isomorphic", floor=0.0)
    for kind in ("heads", "head_dim", "hidden", "embed"):
        groups = [g for g in GRAPH.prunable if g.kind == kind]
        total = sum(g.size for g in groups)
        assert sum(len(kept[g.name]) for g in groups) == total - round(total / 2)


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_budget_is_met_within_two_percent(what: str, share: float) -> None:
    kept = pruners.allocate(GRAPH, scores(), target={what: share})
    params, macs = GRAPH.cost({name: len(units) for name, units in kept.items()})
    found = macs / GRAPH.macs if what == "macs" else params / GRAPH.num_params
    assert found == pytest.approx(share, rel=0.02)


def test_only_the_chosen_kinds_are_pruned() -> None:
    kept = pruners.allocate(GRAPH, scores(), ratio=0.5, kinds=["hidden"])
    assert set(kept) == {"blocks.0.mlp.hidden", "blocks.1.mlp.hidden"}


@pytest.mark.parametrize("pattern", ["blocks.0", "blocks.0.attn.qkv", "blocks.0.attn.heads"])
def test_a_group_with_an_ignored_member_stays_whole(pattern: str) -> None:
    kept = pruners.allocate(GRAPH, scores(), ratio=0.5, ignore=[pattern])
    assert "blocks.0.attn.heads" not in kept and "blocks.1.attn.heads" in kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"),
        ({}, "either a ratio or a target"),
        ({"ratio": 0.5, "target": {"macs": 0.5}}, "either a ratio or a target"),
        ({"target": {"flops": 0.5}}, "'params'"),
        ({"target": {"macs": 0.000001}}, "cannot be reached"),
        ({"ratio": 0.5, "scope": "globl"}, "did you mean 'global'"),
        ({"ratio": 0.5, "normalise": "men"}, "did you mean 'mean'"),
        ({"ratio": 0.5, "kinds": ["head"]}, "did you mean 'heads'"),
        ({"ratio": 0.5, "ignore": ["decoder*"]}, "matches no module"),
        ({"ratio": 0.5, "ignore": ["*"]}, "nothing is left"),
        ({"ratio": 0.5, "min_units": -1}, "at least 0"),
        ({"ratio": 0.5, "round_to": 0}, "at least 1"),
        ({"ratio": 0.5, "round_to": 1000}, "cannot be reached.*round_to"),
        ({"ratio": 0.5, "min_units": 1000}, "cannot be reached.*min_units"),
        ({"ratio": 0.5, "floor": 2.0}, "between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(depgraph.DepgraphError, match=message):
        pruners.allocate(GRAPH, scores(), **arguments)


def test_scores_that_are_missing_misshapen_or_not_finite_are_refused() -> None:
    for broken, message in (
        ({"embed": torch.ones(3)}, "shape"),
        ({"embed": torch.full((48,), float("nan"))}, "not finite"),
    ):
        with pytest.raises(depgraph.DepgraphError, match=f"(?s){message}"):
            pruners.allocate(GRAPH, {**scores(), **broken}, ratio=0.5)
    with pytest.raises(depgraph.DepgraphError, match="no scores for group"):
        pruners.allocate(GRAPH, {}, ratio=0.5)


def test_a_share_of_macs_that_a_model_does_not_have_is_refused() -> None:
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Embedding(5, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.up(x) * self.down).sum(-1)

    with pytest.raises(depgraph.DepgraphError, match="no macs at all"):
        pruners.prune(Factors(), torch.arange(5)[None], "l1", target={"macs": 0.5})
