from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import depgraph
from depgraph.viewing.graphml import write_graphml
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.graphml"
    depgraph.trace(tiny("beit_base_patch16_224"), images()).write_graphml(path)
    return path


def test_graphml_is_read_back_with_groups_members_and_couplings(written: Path) -> None:
    read = nx.read_graphml(written)
    name = "group:blocks.0.attn.heads"
    node = read.nodes[name]
    assert node["type"] == "group" and node["label"] == "blocks.0.attn.heads"
    assert node["units"] == 4 and node["prunable"] is True and node["frozen"] == ""
    members = [(m, d["dims"]) for _, m, d in read.out_edges(name, data=True)]
    assert ("blocks.0.attn.relative_position_bias_table", "1") in members
    parameters = [m for m, _ in members if read.nodes[m]["type"] in ("parameter", "buffer")]
    assert len(parameters) == node["members"]
    outputs = [d for _, d in read.nodes(data=True) if "output" in d["frozen"]]
    assert outputs and not outputs[0]["prunable"]
    couplings = [d for *_, d in read.edges(data=True) if d["type"] == "coupling"]
    assert any(
        d["op"] == "aten.linear" and "heads" in d["groups"] and d["module"] == "blocks.0.attn"
        for d in couplings
    )


def test_graphml_names_every_edge_and_labels_every_node(written: Path) -> None:
    space = "{http://graphml.graphdrawing.org/xmlns}"
    root = ElementTree.parse(written).getroot()
    edges = [edge.get("id") for edge in root.iter(f"{space}edge")]
    assert None not in edges and len(set(edges)) == len(edges)
    network = depgraph.trace(tiny("beit_base_patch16_224"), images()).to_networkx()
    assert len(edges) == network.number_of_edges()
    read = nx.read_graphml(written)
    assert read.number_of_edges() == len(edges) and set(read) == set(network)
    assert all(d["label"] == n.removeprefix("group:") for n, d in read.nodes(data=True))


def test_graphml_says_everything_of_every_node_and_edge(written: Path) -> None:
    """Readers that fill in what is missing, with NaN or a default, then have nothing to fill."""
    read = nx.read_graphml(written)
    for rows in ([d for _, d in read.nodes(data=True)], [d for *_, d in read.edges(data=True)]):
        keys = {key for row in rows for key in row}
        assert all(row.keys() == keys for row in rows)
        assert not keys & {"size", "shape", "color", "weight"}  # some readers draw by these


def test_graphml_has_no_value_that_xml_must_escape(tmp_path: Path) -> None:
    network = depgraph.trace(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4)).to_networkx()
    network.nodes["0.weight"]["module"] = "a<b> & c"
    write_graphml(network, tmp_path / "odd.graphml")
    assert "&" not in (tmp_path / "odd.graphml").read_text(encoding="utf-8")
    assert network.nodes["0.weight"]["module"] == "a<b> & c"
    assert nx.read_graphml(tmp_path / "odd.graphml").nodes["0.weight"]["module"] == "a(b) and c"


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
