"""Groups: one atom each, with every parameter dimension it appears in, named by place and meaning.

What an atom means is read off the graph: `heads` lead an attention product, `head_dim` is what the
product contracts or carries, `embed` and `channels` flow through residual additions, and `hidden`
lies between two layers. No module name and no class decides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from depgraph.coupling.attention import attention_products
from depgraph.coupling.axes import Atom, Axis, Concat, axis_atoms, unit_positions
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.convolve import CONVOLUTIONS
from depgraph.tracing.trace import shape

FIXED = "fixed"
"""Kind of a frozen group that has no other meaning (image channels, tokens, classes, ...)."""


@dataclass(frozen=True)
class Member:
    """One parameter dimension, or a part of it, that shrinks with a group.

    Attributes
    ----------
    parameter : str
        Qualified name, as in ``model.named_parameters()`` (or ``named_buffers()``).
    dim : int
        Dimension of the parameter.
    place : str
        What the whole dimension is made of, for people: ``"3 x heads x head_dim"``.
    """

    parameter: str
    dim: int
    place: str
    _axis: Axis = field(repr=False, compare=False)
    _atom: Atom = field(repr=False, compare=False)

    @property
    def positions(self) -> Tensor:
        """LongTensor (group size, k): the indices along ``dim`` that belong to each unit."""
        return unit_positions(self._axis, self._atom)


@dataclass(frozen=True)
class Group:
    """Units that can be removed only together, wherever they appear.

    Attributes
    ----------
    name : str
        Unique: the module path that its members share, and its kind.
    kind : str
        ``"heads"``, ``"head_dim"``, ``"hidden"``, ``"embed"``, ``"channels"`` or ``"fixed"``.
    size : int
        Number of units.
    frozen : str or None
        Why no unit may be removed; None for a prunable group.
    members : tuple of Member
        Parameter dimensions, in the order of the model.
    buffers : tuple of Member
        The same for buffers.
    """

    name: str
    kind: str
    size: int
    frozen: str | None
    members: tuple[Member, ...]
    buffers: tuple[Member, ...]
    _atom: Atom = field(repr=False, compare=False)


def find_groups(p: Propagation) -> tuple[Group, ...]:
    """Every atom that a parameter dimension is made of, as a group.

    Parameters
    ----------
    p : Propagation
        After its run.

    Returns
    -------
    tuple of Group
        Prunable and frozen, in the order in which the model's parameters mention them.
    """
    places: dict[Atom, list[tuple[str, int, Axis]]] = {}
    for name, node in p.trace.tensors.items():
        for dim, axis in enumerate(p.axes(node)):
            for atom in dict.fromkeys(axis_atoms(axis)):
                places.setdefault(atom, []).append((name, dim, axis))
    places = {
        atom: found
        for atom, found in places.items()
        if any(name in p.trace.parameters for name, _, _ in found)
    }
    kinds = find_kinds(p, places)
    names = _unique_names(p, places, kinds)
    return tuple(_group(p, atom, found, kinds, names) for atom, found in places.items())


def _group(
    p: Propagation,
    atom: Atom,
    found: list[tuple[str, int, Axis]],
    kinds: dict[Atom, str],
    names: dict[Atom, str],
) -> Group:
    members = [Member(name, dim, describe(axis, kinds), axis, atom) for name, dim, axis in found]
    return Group(
        names[atom],
        kinds[atom],
        atom.size,
        atom.frozen,
        tuple(m for m in members if m.parameter in p.trace.parameters),
        tuple(m for m in members if m.parameter not in p.trace.parameters),
        atom,
    )


def describe(axis: Axis, kinds: dict[Atom, str]) -> str:
    """An axis in words: ``"3 x heads x head_dim"``, ``"(hidden ++ hidden)"``."""
    words = []
    for factor in axis:
        if isinstance(factor, Concat):
            words.append("(" + " ++ ".join(describe(part, kinds) for part in factor.parts) + ")")
        else:
            kind = kinds.get(factor, FIXED)
            words.append(str(factor.size) if kind == FIXED else kind)
    return " x ".join(words) or "1"


def find_kinds(p: Propagation, atoms: Iterable[Atom]) -> dict[Atom, str]:
    """What each atom means, by what the ops of the trace do with it."""
    heads, head_dims = _attention_atoms(p)
    streams = _stream_atoms(p)
    convolved = _convolved_atoms(p)
    kinds = {}
    for atom in atoms:
        if atom in heads:
            kinds[atom] = "heads"
        elif atom in streams:
            kinds[atom] = streams[atom]
        elif atom in head_dims:
            kinds[atom] = "head_dim"
        elif atom.frozen:
            kinds[atom] = FIXED
        else:
            kinds[atom] = "channels" if atom in convolved else "hidden"
    return kinds


def _attention_atoms(p: Propagation) -> tuple[set[Atom], set[Atom]]:
    heads: set[Atom] = set()
    head_dims: set[Atom] = set()
    for product in attention_products(p):
        heads.update(atom for axis in product.lead for atom in axis_atoms(axis))
        head_dims.update(axis_atoms((*product.query_dim, *product.value_dim)))
    heads = {atom for atom in heads if not atom.frozen}
    return heads, {atom for atom in head_dims if not atom.frozen} - heads


def _stream_atoms(p: Propagation) -> dict[Atom, str]:
    """Unfrozen atoms that flow on through ``x + f(x)``, and what that makes them.

    A sum of two layers of one input does not make a stream: that is how a low-rank adapter adds to
    a layer, whatever the layer makes.
    """
    carried: dict[fx.Node, set[Atom]] = {}
    active = set(p.trace.inputs)
    found: dict[Atom, str] = {}
    for node in p.trace.nodes:
        if not active.isdisjoint(node.all_input_nodes):
            active.add(node)
        axes = [*p.axes(node), *(axis for axes in p.results(node) for axis in axes)]
        carried[node] = {x for axis in axes for x in axis_atoms(axis) if x.frozen is None}
        if node.op != "call_function" or op_name(node).rstrip("_") != "aten.add":
            continue
        if sum(operand in active for operand in node.all_input_nodes) < 2:
            continue
        kind = "channels" if len(shape(node)) > 3 else "embed"
        new = carried[node] - found.keys()
        found.update((atom, kind) for atom in new if _comes_back(node, atom, carried))
    return found


def _comes_back(node: fx.Node, atom: Atom, carried: Mapping[fx.Node, set[Atom]]) -> bool:
    """Whether a value that has an atom is computed from values without it, and these from such."""
    seen = {(node, False)}
    stack = [(node, False)]
    while stack:
        at, lost = stack.pop()
        for source in at.all_input_nodes:
            if source.op == "placeholder":
                continue
            has = atom in carried[source]
            if lost and has:
                return True
            state = (source, lost or not has)
            if state not in seen:
                seen.add(state)
                stack.append(state)
    return False


def _convolved_atoms(p: Propagation) -> set[Atom]:
    weights = [
        arguments(node)["weight"]
        for node in p.trace.nodes
        if node.op == "call_function" and op_name(node) in CONVOLUTIONS
    ]
    return {atom for node in weights for axis in p.axes(node)[:2] for atom in axis_atoms(axis)}


def _unique_names(
    p: Propagation, places: dict[Atom, list[tuple[str, int, Axis]]], kinds: dict[Atom, str]
) -> dict[Atom, str]:
    """``"<common module path>.<kind>"``, numbered from the second of the same name on."""
    names: dict[Atom, str] = {}
    used: Counter[str] = Counter()
    for atom, found in places.items():
        paths = [name.split(".")[:-1] for name, _, _ in found if name in p.trace.parameters]
        name = ".".join([*_common_prefix(paths), kinds[atom]])
        used[name] += 1
        names[atom] = name if used[name] == 1 else f"{name}_{used[name]}"
    return names


def _common_prefix(paths: list[list[str]]) -> list[str]:
    prefix = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return prefix
