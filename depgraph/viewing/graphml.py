"""The dependency graph as a networkx graph with plain attributes, and as GraphML."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx
from torch import fx

from depgraph.coupling.axes import Axis, axis_atoms
from depgraph.coupling.groups import Group, describe
from depgraph.coupling.propagate import op_name
from depgraph.errors import DepgraphError
from depgraph.files import MARK, replacing
from depgraph.tracing.trace import shape

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
        the same) and ``member`` (group to parameter or value), each with a key of its own. All
        nodes have the same attributes and so have all edges, empty, zero or False where one means
        nothing. ``label`` is the name; ``units`` and ``members`` are how many a group has;
        ``prunable`` is whether anything of the node can be removed.
    """
    return _Builder(graph).out


class _Builder:
    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.out: nx.MultiDiGraph[str] = nx.MultiDiGraph(
            num_params=graph.num_params, macs=graph.macs
        )
        self.names = {node: name for name, node in graph.traced.tensors.items()}
        self.groups = {group._atom: group for group in graph.groups}
        self.kinds = {group._atom: group.kind for group in graph.groups}
        nodes = [node for node in graph.traced.nodes if node.op != "output"]
        for node in nodes:
            self._add_value(node)
        for node in nodes:
            for operand in node.all_input_nodes:
                self._edge(self._name(operand), self._name(node), "data", op=op_name(node))
        self._add_couplings()
        for group in graph.groups:
            self._add_group(group)
        for node in nodes:
            if node not in self.names:
                self._add_memberships(node)

    def _name(self, node: fx.Node) -> str:
        return self.names.get(node, node.name)

    def _node(
        self, name: str, what: str, label: str, prunable: bool, **attributes: str | int
    ) -> None:
        said: dict[str, str | int] = {"type": what, "label": label, "prunable": prunable}
        for key in ("op", "module", "dimensions", "axes", "kind", "frozen"):
            said[key] = attributes.get(key, "")
        for key in ("units", "members"):
            said[key] = attributes.get(key, 0)
        self.out.add_node(name, **said)

    def _edge(self, source: str, target: str, what: str, **attributes: str) -> None:
        keys = ("op", "module", "dims", "place", "groups")
        said = {key: attributes.get(key, "") for key in keys}
        # a key that no other edge has: in GraphML it becomes the edge's id
        key = f"e{self.out.number_of_edges()}"
        self.out.add_edge(source, target, key=key, type=what, **said)

    def _groups_of(self, axes: Iterable[Axis]) -> list[Group]:
        atoms = dict.fromkeys(atom for axis in axes for atom in axis_atoms(axis))
        return [self.groups[atom] for atom in atoms if atom in self.groups]

    def _add_value(self, node: fx.Node) -> None:
        name = self.names.get(node)
        kind = "value" if name is None else "buffer"
        if name in self.graph.traced.parameters:
            kind = "parameter"
        axes = self.graph.propagation.axes(node)
        owner = self.graph.traced.owner.get(node, "")
        self._node(
            self._name(node),
            kind,
            self._name(node),
            any(group.frozen is None for group in self._groups_of(axes)),
            op=op_name(node) if node.op == "call_function" else node.op,
            module=owner if name is None else name.rpartition(".")[0],
            dimensions=" x ".join(map(str, shape(node))),
            axes=" , ".join(describe(axis, self.kinds) for axis in axes),
        )

    def _add_couplings(self) -> None:
        for coupling in self.graph.propagation.couplings:
            (first, dim_a), (second, dim_b) = coupling.first, coupling.second
            groups = self._groups_of([self.graph.propagation.axes(first)[dim_a]])
            self._edge(
                self._name(first),
                self._name(second),
                "coupling",
                op=op_name(coupling.op),
                module=self.graph.traced.owner.get(coupling.op, ""),
                dims=f"{dim_a} = {dim_b}",
                groups=", ".join(group.name for group in groups),
            )

    def _add_group(self, group: Group) -> None:
        node = f"group:{group.name}"
        members = (*group.members, *group.buffers)
        self._node(
            node,
            "group",
            group.name,
            group.frozen is None,
            kind=group.kind,
            units=group.size,
            frozen=group.frozen or "",
            members=len(members),
        )
        for m in members:
            self._edge(node, m.parameter, "member", dims=str(m.dim), place=m.place)

    def _add_memberships(self, value: fx.Node) -> None:
        for dim, axis in enumerate(self.graph.propagation.axes(value)):
            for group in self._groups_of([axis]):
                dims = {"dims": str(dim), "place": str(dim)}
                self._edge(f"group:{group.name}", value.name, "member", **dims)


def _plain(value: object) -> object:
    """An attribute without characters that XML writes as entities: some readers cut it there."""
    return value.translate(_PLAIN) if isinstance(value, str) else value


_PLAIN = str.maketrans({"<": "(", ">": ")", "&": "and"})


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
    graph = graph.copy()
    for attributes in (*dict(graph.nodes.data()).values(), *(d for *_, d in graph.edges.data())):
        attributes.update((key, _plain(value)) for key, value in attributes.items())
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
