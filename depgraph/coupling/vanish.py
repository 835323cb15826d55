"""Freezes what a sum of products could not do without: indices where no factor is zero.

Removing units switches off weights, so a layer's sum over its inputs may lose them. A product of
two activations (``q k^T``, a linear attention, a sum over channels) may only where one of them is
zero at the removed indices, which a ``sigmoid``, an ``exp`` or a ``+ 1`` on the way would undo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from depgraph.coupling.axes import Atom, Axis, axis_atoms
from depgraph.coupling.propagate import Propagation, arguments, op_name
from depgraph.coupling.rules.contract import einsum_terms
from depgraph.coupling.rules.convolve import CONVOLUTIONS, is_transposed
from depgraph.coupling.rules.reduce import reduced_dims
from depgraph.coupling.zeros import FAMILIES, carries
from depgraph.tracing.trace import shape

Place = tuple[fx.Node, int]


def freeze_mixed_sums(p: Propagation) -> None:
    """Freeze every summed dimension that may hold something else than zeros at removed indices.

    Parameters
    ----------
    p : Propagation
        Of a whole model, after its run.

    Notes
    -----
    Looks back from each sum only over values that have the summed atom: linear in the number of
    ops, since an atom between two layers is carried by few.
    """
    vanishing = Vanishing(p)
    for node in p.trace.nodes:
        for places in summed(node):
            if any(factor in vanishing.tensors for factor, _ in places):
                continue
            axes = [p.axes(factor)[dim] for factor, dim in places]
            for atom in dict.fromkeys(atom for axis in axes for atom in _unfrozen(axis)):
                if not any(vanishing(factor, atom) for factor, _ in places):
                    reason = f"{p.label(node)} sums over it, and what it sums does not vanish"
                    p.algebra.freeze((atom,), f"{reason} with its units")


def _unfrozen(axis: Axis) -> Iterator[Atom]:
    return (atom for atom in axis_atoms(axis) if atom.frozen is None)


def summed(node: fx.Node) -> Iterator[list[Place]]:
    """For each dimension that an op sums over, where its factors have it."""
    if node.op != "call_function":
        return
    name = op_name(node)
    if name in _PRODUCTS:
        left, right, dim = _PRODUCTS[name]
        a = arguments(node)
        second = a[right]
        yield [(a[left], -1), (second, max(dim, -len(shape(second))))]
    elif name == "aten.einsum":
        yield from _einsum(node)
    elif name in ("aten.sum", "aten.linalg_vector_norm", "aten.norm", "aten.nansum"):
        x = node.all_input_nodes[0]
        yield from ([(x, dim)] for dim in reduced_dims(node))
    elif name in CONVOLUTIONS:
        a = arguments(node)
        channel = len(shape(a["input"])) - len(shape(a["weight"])) + 1
        yield [(a["weight"], 0 if is_transposed(node) else 1), (a["input"], channel)]


_PRODUCTS = {
    "aten.linear": ("input", "weight", -1),
    "aten.matmul": ("self", "other", -2),
    "aten.mm": ("self", "mat2", -2),
    "aten.bmm": ("self", "mat2", -2),
    "aten._grouped_mm": ("self", "mat2", -2),
    "aten.mv": ("self", "vec", -2),
    "aten.dot": ("self", "tensor", -2),
    "aten.vdot": ("self", "other", -2),
    "aten.addmm": ("mat1", "mat2", -2),
    "aten.baddbmm": ("batch1", "batch2", -2),
    "aten.scaled_dot_product_attention": ("query", "key", -1),
}
"""Factors of a matrix product, of which the first is summed over its last dimension."""


def _einsum(node: fx.Node) -> Iterator[list[Place]]:
    terms, tensors, kept = einsum_terms(node)
    for letter in dict.fromkeys(letter for term in terms for letter in term):
        if letter not in kept:
            pairs = zip(terms, tensors, strict=True)
            yield [(tensor, term.index(letter)) for term, tensor in pairs if letter in term]


class Vanishing:
    """Tells whether a value is zero wherever its index belongs to a removed unit of an atom.

    Attributes
    ----------
    tensors : frozenset of fx.Node
        Parameters and buffers: they are switched off, and so vanish.
    """

    def __init__(self, p: Propagation) -> None:
        self.p = p
        self.tensors = frozenset(p.trace.tensors.values())
        self._known: dict[tuple[fx.Node, Atom], bool] = {}
        self._order = {node: i for i, node in enumerate(p.trace.nodes)}
        self._base: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        for node in p.trace.nodes:
            self._note_storage(node)

    def _note_storage(self, node: fx.Node) -> None:
        """Whose memory a value shares, and whether the op writes there."""
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        alias = returns[0].alias_info if returns else None
        source = node.all_input_nodes[0] if alias and node.all_input_nodes else node
        self._base[node] = self._base.get(source, node)
        if alias and alias.is_write:
            self._writes.setdefault(self._base[node], []).append(node)

    def __call__(self, node: fx.Node, atom: Atom) -> bool:
        """Whether the value, and what is written to the memory of its sources, vanishes."""
        sources = self._sources(node, atom)
        for source in sorted(sources, key=self._order.__getitem__):
            if (source, atom) not in self._known:
                self._known[source, atom] = self._decide(source, atom)
        written = (w for source in sources for w in self._writes.get(self._base[source], ()))
        return self._known.get((node, atom), False) and all(
            self._known.get((w, atom), True) for w in written
        )

    def _sources(self, node: fx.Node, atom: Atom) -> set[fx.Node]:
        """Values with that atom from which this one is computed."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            if at not in found and carries(self.p, at, atom):
                found.add(at)
                stack.extend(at.all_input_nodes)
                stack.extend(self._writes.get(self._base[at], ()))
        return found

    def _decide(self, node: fx.Node, atom: Atom) -> bool:
        if node.op != "call_function":
            return node in self.tensors
        name = op_name(node)
        family = FAMILIES.get(name) or FAMILIES.get(name.rstrip("_"))
        return family is not None and family(self.p, node, atom, self._vanishes(atom))

    def _vanishes(self, atom: Atom) -> Callable[[fx.Node], bool]:
        return lambda operand: self._known.get((operand, atom), False)
