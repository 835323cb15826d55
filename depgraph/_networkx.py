"""The dependency graph as a networkx graph with plain attributes, and as GraphML."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from depgraph.axes import axis_atoms
from depgraph.errors import DepgraphError
from depgraph.files import MARK, replacing
from depgraph.groups import Group, describe
from depgraph.propagate import op_name
from depgraph.trace import shape

if TYPE_CHECKING:
    from depgraph.graph import DependencyGraph


def build_networkx(graph: DependencyGraph) -> nx.MultiDiGraph:
    """Nodes of type ``value``, ``parameter``, ``buffer`` and ``group``, with plain attributes.

    Parameters
    ----------
    graph : DependencyGraph

    Returns
    -------
    networkx.MultiDiGraph
        Edges of type ``data`` (operand to result), ``coupling`` (two dimensions that ``op`` made
        the same) and ``member`` (group to parameter or value).
    """
    out: nx.MultiDiGraph[str] = nx.MultiDiGraph(num_params=graph.num_params, macs=graph.macs)
    labels = {node: name for name, node in graph.traced.tensors.items()}
    kinds = {group._atom: group.kind for group in graph.groups}
    for node in graph.traced.nodes:
        if node.op != "output":
            _add_value(out, graph, node, labels, kinds)
    for node in graph.traced.nodes:
        for operand in node.all_input_nodes if node.op != "output" else ():
            out.add_edge(
                labels.get(operand, operand.name),
                labels.get(node, node.name),
                type="data",
                op=op_name(node),
            )
    _add_couplings(out, graph, labels)
    for group in graph.groups:
        _add_group(out, group)
    _add_values_of_groups(out, graph, labels)
    return out


def _add_value(
    out: nx.MultiDiGraph,
    graph: DependencyGraph,
    node: fx.Node,
    labels: dict[fx.Node, str],
    kinds: dict,
) -> None:
    name = labels.get(node)
    kind = "value" if name is None else "buffer"
    if name in graph.traced.parameters:
        kind = "parameter"
    axes = graph.propagation.axes(node)
    out.add_node(
        name or node.name,
        type=kind,
        op=op_name(node) if node.op == "call_function" else node.op,
        module=graph.traced.owner.get(node, "") if name is None else name.rpartition(".")[0],
        shape=" x ".join(map(str, shape(node))),
        axes=" , ".join(describe(axis, kinds) for axis in axes),
    )


def _add_couplings(
    out: nx.MultiDiGraph, graph: DependencyGraph, labels: dict[fx.Node, str]
) -> None:
    names = {group._atom: group.name for group in graph.groups}
    for coupling in graph.propagation.couplings:
        (first, dim_a), (second, dim_b) = coupling.first, coupling.second
        axis = graph.propagation.axes(first)[dim_a]
        groups = [names[atom] for atom in dict.fromkeys(axis_atoms(axis)) if atom in names]
        out.add_edge(
            labels.get(first, first.name),
            labels.get(second, second.name),
            type="coupling",
            op=op_name(coupling.op),
            module=graph.traced.owner.get(coupling.op, ""),
            dims=f"{dim_a} = {dim_b}",
            groups=", ".join(groups),
        )


def _add_group(out: nx.MultiDiGraph, group: Group) -> None:
    node = f"group:{group.name}"
    members = "; ".join(f"{m.parameter}[{m.dim}]" for m in (*group.members, *group.buffers))
    out.add_node(
        node,
        type="group",
        kind=group.kind,
        size=group.size,
        frozen=group.frozen or "",
        prunable=group.frozen is None,
        members=members,
    )
    for member in (*group.members, *group.buffers):
        out.add_edge(node, member.parameter, type="member", dim=member.dim, place=member.place)


def _add_values_of_groups(
    out: nx.MultiDiGraph, graph: DependencyGraph, labels: dict[fx.Node, str]
) -> None:
    names = {group._atom: group.name for group in graph.groups}
    for value in graph.traced.nodes:
        if value.op == "output" or value in labels:
            continue
        for dim, axis in enumerate(graph.propagation.axes(value)):
            for atom in dict.fromkeys(axis_atoms(axis)):
                if atom in names:
                    group = f"group:{names[atom]}"
                    out.add_edge(group, value.name, type="member", dim=dim, place=str(dim))


def write_graphml(graph: nx.MultiDiGraph, path: str | PathLike[str]) -> None:
    """Write a networkx graph as GraphML, whole or not at all.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        With plain attributes only.
    path : path

    Raises
    ------
    DepgraphError
        When the file cannot be written.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            nx.write_graphml(graph, temporary)
            with temporary.open("ab") as file:
                file.write(f"<!-- {MARK} -->\n".encode())
    except OSError as error:
        raise DepgraphError(
            f"cannot write '{path}': {error.strerror}; choose another path"
        ) from error
