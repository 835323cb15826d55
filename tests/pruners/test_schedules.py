from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from depgraph import DepgraphError
from pruners import schedules
from tests.depgraph.models import images, tiny


def trained(model: nn.Module, steps: int, after_step: Callable[[int], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, labels = images(8), torch.arange(8)
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(step)


def norms(model: nn.Module, graph: depgraph.DependencyGraph) -> dict[str, Tensor]:
    return pruners.score(model, graph, "l2")


def moved(model: nn.Module, plan: depgraph.Plan) -> float:
    """How much a cut changes the output, relative."""
    with torch.no_grad():
        before, after = model(images(8)), plan.apply(model)(images(8))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("budget", [{"ratio": 0.6, "kinds": ["hidden"]}, {"target": {"macs": 0.3}}])
def test_cuts_in_steps_end_at_the_budget_of_one_cut(budget: dict) -> None:
    model = tiny()
    once, plan = pruners.prune(model, images(), "l2", **budget)
    dense = now = depgraph.trace(model, images())
    macs = [dense.macs]
    for step in (1, 2, 3):
        share = schedules.step_budget(dense, now, step, 3, **budget)
        model, _ = pruners.prune(model, images(), "l2", kinds=budget.get("kinds"), **share)
        now = depgraph.trace(model, images())
        macs.append(now.macs)
    assert macs == sorted(macs, reverse=True)
    if "ratio" in budget:
        left = sum(group.size for group in now.prunable)
        assert left == sum(group.size for group in depgraph.trace(once, images()).prunable)
    else:
        assert macs[-1] == pytest.approx(plan.macs, rel=0.04)


def test_a_step_with_nothing_left_to_remove_is_refused() -> None:
    model = tiny()
    dense = depgraph.trace(model, images())
    small, _ = pruners.prune(model, images(), "l2", 0.8)
    now = depgraph.trace(small, images())
    with pytest.raises(DepgraphError, match="nothing left to remove"):
        schedules.step_budget(dense, now, 1, 3, ratio=0.5)
    with pytest.raises(DepgraphError, match="not one of the 3 steps"):
        schedules.step_budget(dense, now, 4, 3, ratio=0.5)


def test_units_shrunk_to_nothing_are_units_switched_off() -> None:
    model = tiny()
    planned = pruners.plan_cut(model, images(), "l2", 0.5, kinds=["hidden", "head_dim"])
    small = planned.plan.apply(model)
    schedules.shrinker(planned.graph, schedules.units_to_go(planned.plan))(model, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), small(images()), rtol=1e-4, atol=1e-5)


def test_growing_regularisation_shrinks_the_units_to_go_and_softens_their_cut() -> None:
    model, other = tiny(), tiny()
    planned = pruners.plan_cut(model, images(), "l2", 0.5, kinds=["hidden", "head_dim"])
    units = schedules.units_to_go(planned.plan)
    before = norms(model, planned.graph)
    shrink = schedules.shrinker(planned.graph, units)
    steps = 30
    trained(
        model,
        steps,
        lambda s: shrink(model, schedules.growing_decay(s / steps, (s + 1) / steps)),
    )
    trained(other, steps, lambda s: None)
    after = norms(model, planned.graph)
    for name, gone in units.items():
        assert (after[name][gone] < 0.3 * before[name][gone]).all()
        kept = list(planned.plan.kept_units[name])
        assert (after[name][kept] > 0.5 * before[name][kept]).all()
    assert moved(model, planned.plan) < 0.3 * moved(other, planned.plan)


def test_a_unit_that_was_shrunk_softly_can_come_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():  # the first unit matters, but is the smaller one at the start
        model[0].weight.copy_(torch.tensor([[0.4, 0.0], [0.0, 0.5]]))
        model[2].weight.fill_(0.5)
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    inputs = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([2, 0.1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    chosen = []
    for epoch in range(5):
        for _ in range(100):
            loss = (model(inputs) - 3 * inputs[:, :1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch == 0:
                break
        cut = pruners.plan_cut(model, inputs[:1], "l2", 0.5)
        units = schedules.units_to_go(cut.plan)
        chosen.append(units["hidden"].tolist())
        schedules.shrinker(cut.graph, units)(model, schedules.soft_factor((epoch + 1) / 5))
    assert chosen[0] == [0] and chosen[-1] == [1]
    assert not model[0].weight[1].any()
