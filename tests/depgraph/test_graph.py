from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from tests.depgraph.models import TINY, images, tiny


@pytest.mark.parametrize("name", TINY)
def test_macs_are_half_the_flops_that_torch_counts(name: str) -> None:
    model = tiny(name)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch does not count the fused kernel on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    graph = depgraph.trace(tiny(name), images(1))
    assert graph.macs * 2 == counter.get_total_flops()
    assert graph.num_params == sum(parameter.numel() for parameter in model.parameters())


def test_cost_of_sizes_is_that_of_a_plan_with_them() -> None:
    graph = depgraph.trace(tiny(), images())
    plan = graph.plan({"embed": range(17), "blocks.1.mlp.hidden": [5]})
    assert graph.cost({"embed": 17, "blocks.1.mlp.hidden": 1}) == (plan.num_params, plan.macs)


def test_graphml_is_read_back_with_groups_members_and_couplings(tmp_path: Path) -> None:
    graph = depgraph.trace(tiny("beit_base_patch16_224"), images())
    graph.write_graphml(tmp_path / "graph.graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml")
    node = read.nodes["group:blocks.0.attn.heads"]
    assert node["type"] == "group" and node["size"] == 4 and node["prunable"] is True
    assert "blocks.0.attn.relative_position_bias_table[1]" in node["members"]
    outputs = [d for _, d in read.nodes(data=True) if "output" in d.get("frozen", "")]
    assert outputs and not outputs[0]["prunable"]
    couplings = [d for *_, d in read.edges(data=True) if d["type"] == "coupling"]
    assert any(
        d["op"] == "aten.linear" and "heads" in d["groups"] and d["module"] == "blocks.0.attn"
        for d in couplings
    )


def test_every_parameter_is_reached_from_its_groups() -> None:
    graph = depgraph.trace(tiny(), images())
    network = graph.to_networkx()
    for name, _ in tiny().named_parameters():
        kinds = {network.nodes[n]["type"] for n in network.predecessors(name)}
        assert network.nodes[name]["type"] == "parameter" and "group" in kinds


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(depgraph.DepgraphError, match="cannot write"):
        depgraph.trace(tiny(), images()).write_graphml(tmp_path / "missing" / "graph.graphml")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_group_is_answered_with_near_names() -> None:
    with pytest.raises(depgraph.DepgraphError, match=r"did you mean.*blocks\.0\.attn\.heads"):
        depgraph.trace(tiny(), images()).group("blocks.0.attn.head")


def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(depgraph.DepgraphError, match=r"nn\.Module"):
        depgraph.trace("vit_base_patch16_224", images())  # type: ignore[arg-type]
