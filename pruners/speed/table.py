"""Times of ops on one device, measured at some sizes and interpolated between them.

Between the points of a grid time is multilinear. What a size costs for being no multiple of a power
of two is a factor on top, one for each dimension and power.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from depgraph import DepgraphError
from depgraph.costing.work import Job

FORMAT = 2
"""Version of the JSON form."""

ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64)
"""Powers of two that a size is or is not a multiple of."""


@dataclass(frozen=True)
class Grid:
    """Milliseconds of one kind of op over its sizes.

    Attributes
    ----------
    kind, fixed : str
        As in `depgraph.costing.work.Work`.
    points : tuple of tuple of int
        For each dimension the sizes measured, ascending; one where it never changes.
    ms : tuple of float
        At each combination of the points, the last dimension fastest.
    factors : tuple of dict
        For each dimension, by alignment: how much longer a size takes than one of the best
        alignment would, were time smooth. Empty where that was not measured.
    """

    kind: str
    fixed: str
    points: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...] = ()
    factors: tuple[dict[int, float], ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """The jobs at the points, in the order of `ms`."""
        return [(self.kind, self.fixed, sizes) for sizes in itertools.product(*self.points)]

    @cached_property
    def _cube(self) -> np.ndarray:
        return np.array(self.ms, dtype=float).reshape([len(points) for points in self.points])

    def smooth(self, sizes: Sequence[int]) -> float:
        """Milliseconds at these sizes, were all of them well aligned."""
        cube: Any = self._cube
        for points, size in zip(self.points, sizes, strict=True):
            if len(points) == 1:
                cube = cube[0]
                continue
            # outside of the points, on along the last or first line
            i = min(max(bisect_right(points, size) - 1, 0), len(points) - 2)
            share = (size - points[i]) / (points[i + 1] - points[i])
            cube = cube[i] + share * (cube[i + 1] - cube[i])
        least = min(self.ms) * min(
            (size / points[0] for points, size in zip(self.points, sizes, strict=True)), default=1.0
        )
        return max(float(cube), min(least, min(self.ms)), 0.0)

    def at(self, sizes: Sequence[int]) -> float:
        """Milliseconds at these sizes."""
        factor = 1.0
        for factors, size in zip(self.factors, sizes, strict=False):
            factor *= factors.get(alignment(size), 1.0)
        return self.smooth(sizes) * factor

    def covers(self, sizes: Sequence[int]) -> bool:
        """Whether the sizes are those of the fixed dimensions and not beyond the others."""
        return len(sizes) == len(self.points) and all(
            size == points[0] if len(points) == 1 else size <= points[-1]
            for points, size in zip(self.points, sizes, strict=True)
        )


def alignment(size: int) -> int:
    """The largest of `ALIGNMENTS` that a size is a multiple of."""
    return math.gcd(size, ALIGNMENTS[-1])


@dataclass(frozen=True)
class Device:
    """What a table was measured on, and in what."""

    device: str
    name: str
    threads: int
    dtype: str
    torch_version: str


@dataclass(frozen=True)
class LatencyTable:
    """All grids measured on one device.

    Attributes
    ----------
    device : Device
    grids : tuple of Grid
    factors : dict of str to dict of str to float
        By model (`LatencyModel.identity`), how much longer each kind of op takes in
        it than alone.

    Examples
    --------
    >>> grid = Grid("linear", "", ((1,), (8, 64), (8, 64)), (1.0, 2.0, 3.0, 4.0))
    >>> table = LatencyTable(Device("cpu", "any", 1, "float32", "2.6"), (grid,))
    >>> table.ms(("linear", "", (1, 36, 64)))
    3.0
    >>> LatencyTable.from_json(table.to_json()) == table
    True
    """

    device: Device
    grids: tuple[Grid, ...] = ()
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    _known: dict[Job, float] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _by_kind(self) -> dict[tuple[str, str], list[Grid]]:
        found: dict[tuple[str, str], list[Grid]] = {}
        for grid in self.grids:
            found.setdefault((grid.kind, grid.fixed), []).append(grid)
        return found

    def find(self, job: Job) -> Grid | None:
        """The grid that covers a job, the finest one; None where none does."""
        kind, fixed, sizes = job
        fitting = [g for g in self._by_kind.get((kind, fixed), []) if g.covers(sizes)]
        return max(fitting, key=lambda grid: len(grid.ms), default=None)

    def ms(self, job: Job) -> float:
        """Milliseconds that a job takes.

        Raises
        ------
        DepgraphError
            When nothing like it was measured.
        """
        if job not in self._known:
            grid = self.find(job)
            if grid is None:
                raise DepgraphError(
                    f"the latency table has no {job[0]} of sizes {job[2]}; measure it for this "
                    "model and batch size"
                )
            self._known[job] = grid.at(job[2]) if all(job[2]) else 0.0
        return self._known[job]

    def with_grids(self, grids: Iterable[Grid]) -> LatencyTable:
        """A table that holds these too."""
        return LatencyTable(self.device, (*self.grids, *grids), self.factors)

    def with_factors(self, model: str, factors: Mapping[str, float]) -> LatencyTable:
        """A table that holds the factors of a model too."""
        return LatencyTable(self.device, self.grids, {**self.factors, model: dict(factors)})

    def to_json(self) -> str:
        """The table as JSON text."""
        grids = [asdict(grid) for grid in self.grids]
        device = asdict(self.device)
        return json.dumps(
            {"format": FORMAT, "device": device, "grids": grids, "factors": dict(self.factors)}
        )

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The table that `to_json` wrote.

        Raises
        ------
        DepgraphError
            When the text is no table, or one of another version.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                found = str(data["format"])[:20]
                raise DepgraphError(
                    f"the latency table has format {found}, not {FORMAT}; measure it anew"
                )
            grids = tuple(_grid(item) for item in data["grids"])
            return cls(Device(**data["device"]), grids, _factors(data["factors"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, DepgraphError):
                raise
            raise DepgraphError(f"this is no latency table: {error}; measure it anew") from error


def _factors(data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        model: {kind: float(factor) for kind, factor in factors.items()}
        for model, factors in data.items()
    }


def _grid(data: Mapping[str, Any]) -> Grid:
    grid = Grid(
        data["kind"],
        data["fixed"],
        tuple(tuple(points) for points in data["points"]),
        tuple(data["ms"]),
        tuple({int(k): float(v) for k, v in factors.items()} for factors in data["factors"]),
    )
    if len(grid.ms) != math.prod(len(points) for points in grid.points):
        raise ValueError(f"a grid of {grid.kind} has {len(grid.ms)} times")
    return grid
