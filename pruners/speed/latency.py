"""What a plan's latency will be: the work of each op, at the plan's sizes, looked up in a table.

Only sizes go in; nothing is run. What is not in it: that ops of a GPU overlap with the next launch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import product

from depgraph import DependencyGraph, Group
from depgraph.costing.work import Job, Work, batch_atoms, work_of
from depgraph.coupling.axes import Atom
from pruners.speed.table import ALIGNMENTS, Grid, LatencyTable, alignment


class LatencyModel:
    """Predicts the latency of a model, pruned to any sizes, on one device.

    Parameters
    ----------
    graph : DependencyGraph
    table : LatencyTable
        Covers the model at this batch size; see `missing_grids`.
    batch_size : int
        Samples of one forward.

    Raises
    ------
    DepgraphError
        When the table lacks an op.
    """

    def __init__(self, graph: DependencyGraph, table: LatencyTable, batch_size: int = 1) -> None:
        self.graph = graph
        self.table = table
        self.batch_size = batch_size
        self._atoms = {group.name: group._atom for group in graph.prunable}
        self._batch = dict.fromkeys(batch_atoms(graph.propagation), batch_size)
        self._work = work_of(graph.propagation)
        self._frontiers: dict[object, tuple[int, ...]] = {}
        self._factors = table.factors.get(self.identity, {})
        self.dense_ms = self.ms({})

    @cached_property
    def identity(self) -> str:
        """Equal for models that run the same ops at the same sizes and batch size."""
        jobs = sorted(repr(work.job(self._batch)) for work in self._work)
        return hashlib.sha256("\n".join(jobs).encode()).hexdigest()[:16]

    @property
    def is_fitted(self) -> bool:
        """Whether whole models like this one were timed (`speed.context`), not only its ops."""
        return bool(self._factors)

    def ms(self, sizes: Mapping[str, int]) -> float:
        """Milliseconds of one forward when groups have these sizes.

        Parameters
        ----------
        sizes : mapping of str to int
            Units left of each group; a group left out has its full size.
        """
        return self._sum(self._work, self._of_atoms(sizes))

    def share(self, sizes: Mapping[str, int]) -> float:
        """The same, as a share of the dense model's latency."""
        return self.ms(sizes) / self.dense_ms

    def by_kind(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Milliseconds of each kind of op."""
        atoms, found = self._of_atoms(sizes), dict[str, float]()
        for work in self._work:
            found[work.kind] = found.get(work.kind, 0.0) + self._sum([work], atoms)
        return found

    def _of_atoms(self, sizes: Mapping[str, int]) -> dict[Atom, int]:
        return {**self._batch, **{self._atoms[name]: size for name, size in sizes.items()}}

    def _sum(self, work: Iterable[Work], atoms: Mapping[Atom, int]) -> float:
        return sum(
            self._factors.get(w.kind, 1.0) * self.table.ms(w.job(atoms))
            for w in work
            if not w.is_folded(atoms)
        )

    @cached_property
    def _touching(self) -> dict[Atom, list[Work]]:
        found: dict[Atom, list[Work]] = {}
        for work in self._work:
            for atom in work.atoms:
                found.setdefault(atom, []).append(work)
        return found

    def fast_sizes(
        self, group: Group, sizes: Mapping[str, int] | None = None, least: int = 0
    ) -> tuple[int, ...]:
        """Sizes of a group than which no larger one is as fast.

        Parameters
        ----------
        group : Group
        sizes : mapping of str to int, optional
            Of the other groups.
        least : int
            Sizes below do not matter.

        Returns
        -------
        tuple of int
            Ascending; the last is the group's full size.
        """
        atoms, atom = self._of_atoms(sizes or {}), self._atoms[group.name]
        work = self._touching.get(atom, [])
        # groups alike, such as those of equal blocks, have the same answer
        places = (group.size, group.size - 1)
        key = (least, *(w.job({**atoms, atom: n}) for n in places for w in work))
        if key not in self._frontiers:
            found, fastest = [], float("inf")
            for size in range(group.size, least - 1, -1):
                time = self._sum(work, {**atoms, atom: size})
                if time < fastest:
                    found.append(size)
                    fastest = time
            self._frontiers[key] = tuple(reversed(found))
        return self._frontiers[key]

    def no_slower(self, group: Group, sizes: Mapping[str, int], multiple: int = 1) -> int:
        """The largest size of a group that is as fast as the one it has, a few units on at most.

        Parameters
        ----------
        group : Group
        sizes : mapping of str to int
            Of all groups.
        multiple : int
            Of which the size has to be one.
        """
        atoms, atom = self._of_atoms(sizes), self._atoms[group.name]
        work, here = self._touching.get(atom, []), sizes[group.name]
        most = self._sum(work, atoms)
        last = min(group.size, here + ALIGNMENTS[-1])
        larger = (n for n in range(last, here, -1) if n % multiple == 0)
        fitting = (n for n in larger if self._sum(work, {**atoms, atom: n}) <= most)
        return next(fitting, here)

    def multiples(self, group: Group) -> dict[int, float]:
        """How much longer a group's ops take at sizes aligned to 1, 2, 4, ... than smooth ones."""
        atom, atoms = self._atoms[group.name], dict(self._batch)
        work = self._touching.get(atom, [])
        found = {}
        for step in ALIGNMENTS:
            near = [n for n in range(group.size // 2, group.size) if alignment(n) == step]
            if near:
                at = {**atoms, atom: near[0]}
                smooth = sum(self._smooth(w.job(at)) for w in work)
                found[step] = self._sum(work, at) / max(smooth, 1e-30)
        return found

    def _smooth(self, job: Job) -> float:
        grid = self.table.find(job)
        return grid.smooth(job[2]) if grid is not None else 0.0


def missing_grids(graph: DependencyGraph, table: LatencyTable, batch_size: int = 1) -> list[Grid]:
    """What has still to be measured, before a table tells the latency of a model's plans.

    Parameters
    ----------
    graph : DependencyGraph
    table : LatencyTable
    batch_size : int

    Returns
    -------
    list of Grid
        Without times.
    """
    batch = dict.fromkeys(batch_atoms(graph.propagation), batch_size)
    largest: dict[object, tuple[Work, list[int]]] = {}
    for work in work_of(graph.propagation):
        job = work.job(batch)
        grid = table.find(job)
        if grid is not None and _varies_as(grid, work):
            continue
        constant = tuple(
            None if varies else n for n, varies in zip(job[2], work.varies, strict=True)
        )
        _, sizes = largest.setdefault((*job[:2], constant), (work, list(job[2])))
        sizes[:] = map(max, sizes, job[2])
    return [
        Grid(
            work.kind,
            work.fixed,
            tuple(
                spread(n) if varies else (n,) for n, varies in zip(sizes, work.varies, strict=True)
            ),
        )
        for work, sizes in largest.values()
    ]


def _varies_as(grid: Grid, work: Work) -> bool:
    return all(
        len(points) > 1 or not varies or points == (1,)
        for points, varies in zip(grid.points, work.varies, strict=True)
    )


def spread(largest: int) -> tuple[int, ...]:
    """Sizes to measure at: twofold steps down from the largest, well aligned."""
    if largest == 1:
        return (1, 2)
    # not finer than an eighth of the whole: small sizes cost little however they are predicted
    step = next(a for a in reversed(ALIGNMENTS) if a == 1 or largest >= 8 * a)
    top = -(-largest // step) * step
    shares = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
    return tuple(sorted({max(round(top * share / step), 1) * step for share in shares}))


def probes(grid: Grid) -> dict[tuple[int, int], list[Job]]:
    """Jobs that tell the factor of each alignment in each dimension.

    Parameters
    ----------
    grid : Grid

    Returns
    -------
    dict of (dim, alignment) to list of Job
        All other dimensions at a middle point.
    """
    if grid.kind in ("call", "module", "copy"):
        return {}
    middle = [points[len(points) // 2] for points in grid.points]
    found: dict[tuple[int, int], list[Job]] = {}
    for dim, points in enumerate(grid.points):
        best = min(map(alignment, points)) if len(points) > 1 else 1
        if points[-1] < 32:
            continue  # such as heads: most of their sizes are points themselves
        for step, base in product([a for a in ALIGNMENTS if a < best], points[-3:-1]):
            sizes = [*middle[:dim], base - step, *middle[dim + 1 :]]
            if base > step and alignment(base - step) == step:
                found.setdefault((dim, step), []).append((grid.kind, grid.fixed, tuple(sizes)))
    return found


def with_times(grid: Grid, times: Mapping[Job, float]) -> Grid:
    """A grid with the milliseconds that its jobs and `probes` took."""
    whole = Grid(grid.kind, grid.fixed, grid.points, tuple(times[job] for job in grid.jobs))
    factors: list[dict[int, float]] = [{} for _ in grid.points]
    for (dim, step), jobs in probes(grid).items():
        ratios = [times[job] / max(whole.smooth(job[2]), 1e-12) for job in jobs]
        factors[dim][step] = min(ratios)  # noise only ever adds
    for known in factors:
        worst = 1.0
        for step in sorted(known, reverse=True):  # a better alignment is never slower
            worst = known[step] = max(known[step], worst)
    return Grid(grid.kind, grid.fixed, grid.points, whole.ms, tuple(factors))
