"""What the page of `inspect` shows of a dependency graph, as plain data.

Ops and values are summed up by the module that runs them, so that the page of a deep model stays
small: what is drawn at once is the groups, and the modules that one group goes through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
from torch import Tensor, fx

from depgraph import DependencyGraph
from depgraph.coupling.axes import axis_atoms
from depgraph.coupling.propagate import op_name

MOST_MODULES = 40
"""Modules drawn for one group; where there are more, those of one block are one."""


def explore(
    graph: DependencyGraph,
    scores: Mapping[str, Tensor] | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """One entry for each group, in the order of `DependencyGraph.groups`.

    Parameters
    ----------
    graph : DependencyGraph
    scores : mapping of str to Tensor, optional
        One per unit, by group name.
    kept : mapping of str to sequence of int, optional
        Units that a plan keeps; a group left out keeps all.

    Returns
    -------
    list of dict
        ``place`` and ``kind`` say where it is drawn; ``couplings`` which ops made its dimensions
        the same, and ``modules`` and ``edges`` the same as a picture.
    """
    couplings = _couplings(graph)
    out = []
    for group in graph.groups:
        found = couplings.get(group.name, Counter())
        scored = None if scores is None else scores.get(group.name)
        units = None if kept is None or group.frozen else kept.get(group.name, range(group.size))
        out.append(
            {
                "name": group.name,
                "place": block_of(group.name.rpartition(".")[0]),
                "scores": None if scored is None else [float(f"{x:.4g}") for x in scored.tolist()],
                "mean": None if scored is None else float(scored.double().mean()),
                "kept": None if units is None else len(units),
                "removed": None if units is None else _removed(group.size, units),
                "couplings": [
                    {"op": op, "module": module, "first": first, "second": second, "count": count}
                    for (op, module, first, second), count in found.items()
                ],
                **_picture(found),
            }
        )
    return out


def _removed(size: int, units: Sequence[int]) -> list[int]:
    return sorted(set(range(size)) - set(map(int, units)))


def block_of(path: str) -> str:
    """A module path up to its last number, ``"blocks.3.attn"`` in block ``"blocks.3"``."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts[:1]) or "model"


def _couplings(graph: DependencyGraph) -> dict[str, Counter[tuple[str, str, str, str]]]:
    """For each group how often an op, in a module, made which two places the same."""
    names = {group._atom: group.name for group in graph.groups}
    labels = {node: name for name, node in graph.traced.tensors.items()}
    owner = graph.traced.owner

    def place(end: tuple[fx.Node, int]) -> str:
        node, dim = end
        if node in labels:
            return f"{labels[node]}[{dim}]"
        return owner.get(node, "") or ("input" if node.op == "placeholder" else "model")

    out: dict[str, Counter[tuple[str, str, str, str]]] = {}
    for coupling in graph.propagation.couplings:
        node, dim = coupling.first
        said = (op_name(coupling.op), owner.get(coupling.op, "") or "model")
        for atom in dict.fromkeys(axis_atoms(graph.propagation.axes(node)[dim])):
            if atom in names:
                key = (*said, place(coupling.first), place(coupling.second))
                out.setdefault(names[atom], Counter())[key] += 1
    return out


def _picture(couplings: Counter[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Modules that a group goes through, laid out by networkx, and the ops that join them."""
    fine = _joined(couplings, _module)
    joined = (
        fine if len(fine) <= MOST_MODULES else _joined(couplings, lambda x: block_of(_module(x)))
    )
    places = nx.spring_layout(joined, seed=0, iterations=60) if len(joined) else {}
    return {
        "modules": [
            {"name": name, "x": round(float(x), 3), "y": round(float(y), 3)}
            for name, (x, y) in places.items()
        ],
        "edges": [
            {"first": first, "second": second, "ops": ", ".join(sorted(data["ops"]))}
            for first, second, data in joined.edges(data=True)
        ],
    }


def _module(place: str) -> str:
    """The module that holds a parameter, or that makes a value."""
    if place.endswith("]"):
        return place.partition("[")[0].rpartition(".")[0] or "model"
    return place


def _joined(couplings: Counter[tuple[str, str, str, str]], short: Any) -> nx.Graph:
    out: nx.Graph[str] = nx.Graph()
    for op, _, first, second in couplings:
        a, b = short(first), short(second)
        out.add_nodes_from((a, b))
        if a != b:
            out.add_edge(a, b, ops={*out.get_edge_data(a, b, {"ops": set()})["ops"], op})
    return out
