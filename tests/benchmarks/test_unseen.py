from __future__ import annotations

from typing import Any

import pytest
import torch

import depgraph
from benchmarks import unseen, unseen_ways
from benchmarks.peer import torch_pruning_to
from tests.depgraph.models import images, tiny


def row(target: str, sources: float, lost: float) -> dict[str, Any]:
    return {
        "target_domain": target,
        "macs": 0.36,
        "cut": "styles",
        "training": None,
        "epochs": 0,
        "pruned": {"sources": 0.8, "unseen": 0.6},
        "loss": {"sources": sources, "unseen": lost},
    }


def test_a_line_has_the_mean_its_error_and_what_a_point_of_the_sources_costs_elsewhere() -> None:
    (line,) = unseen._lines([row("a", 2.0, 3.0), row("b", 4.0, 9.0)])
    assert line == (
        *("0.36", "styles", "none", "0", "80%", "60%"),
        *("3.0 ± 1.0", "6.0 ± 3.0", "2.0", "2"),
    )


def test_what_loses_nothing_on_the_sources_has_no_such_share() -> None:
    (line,) = unseen._lines([row("a", -1.0, 3.0)])
    assert line[-2:] == ("", "1")


@pytest.mark.parametrize("name", [*unseen_ways.PRESETS])
def test_a_method_of_others_cuts_as_its_preset_says(name: str) -> None:
    cut, said = unseen_ways.CUTS[name], unseen_ways.PRESETS[name]
    assert {"metric": cut.metric, **cut.options} == said


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_the_peer_is_cut_to_a_share_of_the_macs() -> None:
    pytest.importorskip("torch_pruning")
    model, x = tiny("vit_base_patch16_224"), images(1)
    small = torch_pruning_to(model, x, 0.5)
    share = depgraph.count_macs(small, x) / depgraph.count_macs(model, x)
    assert 0.35 < share <= 0.5
    assert small(torch.zeros_like(x)).shape == model(x).shape
