from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depgraph
import pruners
from depgraph import DepgraphError
from pruners import PRESETS
from pruners.refitting.compensation import compensate
from tests.depgraph.models import images, tiny
from tests.reference import randomise, state


def batches(samples: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(len(x), dtype=torch.long)) for x in images(samples).split(16)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_smaller_model(name: str) -> None:
    model = randomise(tiny())
    before = state(model)
    chosen: dict[str, Any] = PRESETS[name]
    small, plan = pruners.prune(
        model, images(), **chosen, target={"macs": 0.7}, batches=batches(), seed=0
    )
    dense = depgraph.trace(model, images())
    assert plan.macs / dense.macs == pytest.approx(0.7, abs=0.1)
    assert small(images()).isfinite().all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())


def test_units_that_vary_least_go_first_and_their_means_to_the_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight[:3] *= 0.001  # constant up to rounding
        net[0].bias[:3] += 2
        net[2].weight[:, :3] += 3  # and read with large weights, which is not looked at
    x = torch.randn(200, 4)
    data = [(x, torch.zeros(200, dtype=torch.long))]
    small, plan = pruners.prune(net, x[:2], **PRESETS["vbp"], ratio=0.5, batches=data)
    assert plan.kept_units["hidden"] == (3, 4, 5) or list(plan.kept_units["hidden"]) == [3, 4, 5]
    assert torch.equal(small[2].weight, net[2].weight[:, 3:])
    torch.testing.assert_close(small(x), net(x), rtol=1e-2, atol=2e-2)


def test_a_shift_of_means_keeps_the_means_and_the_weights() -> None:
    model = randomise(tiny())
    graph = depgraph.trace(model, images())
    plan = graph.plan({g.name: range(0, g.size, 2) for g in graph.prunable if g.kind == "hidden"})
    raw, small = plan.apply(model), plan.apply(model)
    assert compensate(model, small, plan, batches(), what="means")
    for name, weight in raw.named_parameters():
        changed = not torch.equal(weight, small.get_parameter(name))
        assert changed == name.endswith("fc2.bias"), name
    x = images(64)
    wanted, was, now = (m(x).detach() for m in (model, raw, small))
    assert (now - wanted).norm() < (was - wanted).norm()


def test_another_word_for_the_compensation_is_refused() -> None:
    with pytest.raises(DepgraphError, match="'mean'"):
        pruners.prune(tiny(), images(), compensate="mean", batches=batches())  # type: ignore[arg-type]
