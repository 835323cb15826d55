"""Multiply-accumulates of a whole trace for one sample, when its atoms have any sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import fx

from depgraph.costing.products import COUNTED, Count, Counter
from depgraph.costing.work import batch_atoms
from depgraph.coupling.axes import Atom, Axis, axis_atoms
from depgraph.coupling.propagate import Propagation, op_name


class Macs:
    """What has to be computed for each op of a trace that sums products.

    Parameters
    ----------
    p : Propagation
        After its run.
    """

    def __init__(self, p: Propagation) -> None:
        self.counts = {
            node: count(p, node)
            for node in p.trace.nodes
            if node.op == "call_function" and (count := _counter(node))
        }
        self._batch = self._batch_of(p)
        self._times = self._repeated(p) if self._batch and p.opaque_values else {}

    def of_one_sample(self, sizes: Mapping[Atom, int], without: Collection[fx.Node] = ()) -> int:
        """Multiply-accumulates at batch 1.

        Parameters
        ----------
        sizes : mapping of Atom to int
            Sizes that atoms have; the full one for an atom left out.
        without : collection of fx.Node
            Ops that are not computed.

        Notes
        -----
        Work that does not have the batch as a dimension is done once, whatever the batch, and so
        counts whole.
        """
        at = {**dict.fromkeys(self._batch, 1), **sizes}
        return sum(
            count.macs(at) // self._times.get(count, 1)
            for node, counts in self.counts.items()
            if node not in without
            for count in counts
        )

    def _batch_of(self, p: Propagation) -> tuple[Atom, ...]:
        """What the number of samples is the size of.

        The leading dimension of the inputs is no batch where a parameter has it too or, if it is
        longer than two, an op sums over it or steps along it (a batch of one is traced as two):
        features of a single sample, or tokens before the batch.
        """
        batch = batch_atoms(p)
        axes = [axis for node in p.trace.tensors.values() for axis in p.axes(node)]
        if p.trace.batch > 2:
            products = (count for counts in self.counts.values() for count in counts)
            axes.extend(axis for product in products for axis in product.summed)
        fixed = {atom for axis in axes for atom in axis_atoms(axis)}
        return () if fixed.intersection(batch) else batch

    def _repeated(self, p: Propagation) -> dict[Count, int]:
        """How often products are computed of which it is not known where they have the batch.

        They come after an op without a rule: what they do is taken to be done for each sample.
        """
        lost: set[fx.Node] = set()
        found: dict[Count, int] = {}
        for node in p.trace.nodes:
            before = node.all_input_nodes
            for count in () if lost.isdisjoint(before) else self.counts.get(node, ()):
                if not self._has_batch((*count.axes, *count.summed)):
                    found[count] = p.trace.batch
            own = [*p.axes(node), *(axis for axes in p.results(node) for axis in axes)]
            if not self._has_batch(own) and (
                not lost.isdisjoint(before)
                or (node in p.opaque_values and any(self._has_batch(p.axes(x)) for x in before))
            ):
                lost.add(node)
        return found

    def _has_batch(self, axes: Iterable[Axis]) -> bool:
        return any(atom in self._batch for axis in axes for atom in axis_atoms(axis))


def _counter(node: fx.Node) -> Counter | None:
    """What counts an op, or the one that it does in place."""
    return COUNTED.get(op_name(node)) or COUNTED.get(op_name(node).rstrip("_"))
