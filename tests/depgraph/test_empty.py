"""Plans that leave nothing of a group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from tests.depgraph.models import TINY, images, tiny
from tests.reference import (
    masked,
    measured_macs,
    measured_params,
    randomise,
    relative_difference,
)

EMPTIED = [
    ["blocks.0.mlp.hidden"],
    ["blocks.1.attn.heads"],
    ["blocks.0.attn.head_dim"],
    ["blocks.0.mlp.hidden", "blocks.0.attn.heads"],
    ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden", "blocks.0.attn.heads", "blocks.1.attn.heads"],
]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("emptied", EMPTIED, ids="+".join)
@torch.no_grad()
def test_a_branch_of_which_nothing_is_left_adds_its_bias(name: str, emptied: list[str]) -> None:
    model = randomise(tiny(name))
    graph = depgraph.trace(model, images())
    kept = {g.name: range(0, g.size, 2) for g in graph.prunable if g.kind == "embed"}
    plan = graph.plan({**kept, **dict.fromkeys(emptied, ())})
    small = plan.apply(model)
    for x in (images(), torch.cat([images(), images()])):
        assert relative_difference(small(x), masked(model, plan)(x)) < 1e-5
    for i in range(2):  # nothing of the branch is computed but its bias
        for branch, norm in ((f"blocks.{i}.attn", "norm1"), (f"blocks.{i}.mlp", "norm2")):
            gone = any(group.startswith(branch) for group in emptied)
            assert isinstance(small.get_submodule(f"blocks.{i}.{norm}"), nn.Identity) == gone
    assert measured_params(small) == plan.num_params
    assert measured_macs(small, images()) == plan.macs
    assert small.train()(images()).shape == (len(images()), 10)


def test_it_is_saved_and_loaded_and_its_plan_is_text(tmp_path: Path) -> None:
    model = tiny()
    plan = depgraph.trace(model, images()).plan(dict.fromkeys(EMPTIED[-1], ()))
    depgraph.save(depgraph.Plan.from_json(plan.to_json()).apply(model), tmp_path)
    loaded = depgraph.load(tmp_path)
    assert torch.equal(loaded(images()), plan.apply(model)(images()))
    assert depgraph.plans_of(loaded) == (plan,)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_an_emptied_model_is_pruned_again(name: str) -> None:
    model = randomise(tiny(name))
    small = depgraph.trace(model, images()).plan(dict.fromkeys(EMPTIED[3], ())).apply(model)
    graph = depgraph.trace(small, images())
    assert {"embed", "blocks.1.attn.heads", "blocks.1.mlp.hidden"} <= {
        group.name for group in graph.prunable
    }
    plan = graph.plan({group.name: range(0, group.size, 2) for group in graph.prunable})
    assert relative_difference(plan.apply(small)(images()), masked(small, plan)(images())) < 1e-5
    smaller, _ = pruners.prune(small, images(), "l2", 0.5)
    assert smaller(images()).shape == small(images()).shape


class Views(nn.Module):
    """Halves of the channels, of (tokens, batch, channels) in windows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y = self.up(x.reshape(-1, 3, 8)).unflatten(-1, (2, 6)).sin().flatten(-2)
        return self.head(self.down(y).reshape(x.shape)[:, 0])


def test_the_work_of_an_emptied_model_is_that_of_the_plan() -> None:
    model, x = Views().eval(), torch.zeros(6, 3, 8)
    graph = depgraph.trace(model, x)
    (halves,) = (group.name for group in graph.prunable if group.size == 6)
    plan = graph.plan({halves: []})
    assert depgraph.count_macs(plan.apply(model), x) == plan.macs


class Residual(nn.Module):
    """A branch of linear layers, one of convolutions, and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.branch(x)).mean((2, 3))
        return self.head(x + self.down(self.up(x).relu()))


def test_where_nothing_has_no_meaning_one_unit_stays_and_the_reason_is_said() -> None:
    graph = depgraph.trace(Residual(), torch.zeros(2, 3, 8, 8))
    by_size = {group.size: group.name for group in graph.prunable}
    with pytest.raises(depgraph.DepgraphError, match=r"aten.conv2d in .* has no meaning without"):
        graph.plan({by_size[6]: []})
    assert graph.needs_a_unit(by_size[12]) is None
    with pytest.raises(depgraph.DepgraphError, match=r"'embed': .*; keep at least one"):
        depgraph.trace(tiny(), images()).plan({"embed": []})


def test_a_plan_read_from_text_cannot_empty_a_norm() -> None:
    model = tiny()
    text = depgraph.trace(model, images()).plan({"embed": [1, 2]}).to_json()
    plan = depgraph.Plan.from_json(text.replace('"embed": [\n   1,\n   2\n  ]', '"embed": []'))
    assert plan.kept_units == {"embed": ()}
    with pytest.raises(depgraph.DepgraphError, match="keep at least one"):
        plan.apply(model)


def test_allocation_empties_what_scores_nothing_and_may_go() -> None:
    model = tiny()
    graph = depgraph.trace(model, images())
    scores = {g.name: torch.ones(g.size) + torch.arange(g.size) / 100 for g in graph.prunable}
    scores["blocks.0.mlp.hidden"] *= 1e-6
    scores["embed"] *= 1e-7
    few = {"scope": "global", "normalise": "none", "floor": 0.0, "ratio": 0.6}
    kept = pruners.allocate(graph, scores, min_units=0, **few)
    assert len(kept["blocks.0.mlp.hidden"]) == 0
    assert len(kept["embed"]) == 1  # a norm runs over it
    assert len(pruners.allocate(graph, scores, **few)["blocks.0.mlp.hidden"]) == 1
