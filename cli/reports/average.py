"""Means and standard errors over seeds, of what is first averaged over the unseen domains.

As DomainBed reports it: one number a seed is the mean over all choices of the unseen domain; the
standard error is over seeds. Differences to the dense model are taken within each run.

References
----------
Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.reports.collect import Kind, Result
from cli.reports.paper import Cited, cited
from cli.running.kept import START, kept


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; None for the latter with fewer than two seeds."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of the table: one kind of result.

    Attributes
    ----------
    kind : Kind
    runs, seeds : int
    targets : tuple of str
        The unseen domains that were averaged over.
    kept_start : int
        Runs whose training after the cut did not improve the model.
    missing : int
        Runs that would make it complete: all its seeds with all its targets.
    values : dict of str to Mean
        By the names of `COLUMNS`.
    paper : Cited, optional
        The paper's own figures.
    """

    kind: Kind
    runs: int
    seeds: int
    targets: tuple[str, ...]
    kept_start: int
    missing: int
    values: dict[str, Mean]
    paper: Cited | None


COLUMNS: dict[str, Callable[[Result], float]] = {
    "dense_source": lambda row: 100 * row["dense"]["source_accuracy"],
    "source": lambda row: 100 * row["pruned"]["source_accuracy"],
    "source_drop": lambda row: _drop(row, "source_accuracy"),
    "dense_unseen": lambda row: 100 * row["dense"]["target_accuracy"],
    "unseen": lambda row: 100 * row["pruned"]["target_accuracy"],
    "unseen_drop": lambda row: _drop(row, "target_accuracy"),
    "source_before": lambda row: 100 * row["pruned_only"]["source_accuracy"],
    "unseen_before": lambda row: 100 * row["pruned_only"]["target_accuracy"],
    "speedup": lambda row: row["speedup"],
    "latency_ms": lambda row: row["pruned"]["latency_ms"],
    "dense_latency_ms": lambda row: row["dense"]["latency_ms"],
    "latency_share": lambda row: 100 / row["speedup"],
    "dense_latency_share": lambda row: 100.0,
    "macs": lambda row: row["pruned"]["macs"],
    "macs_share": lambda row: 100 * row["pruned"]["macs"] / row["dense"]["macs"],
    "dense_macs": lambda row: row["dense"]["macs"],
    "params": lambda row: row["pruned"]["params"],
    "params_share": lambda row: 100 * row["pruned"]["params"] / row["dense"]["params"],
    "tuning_s": lambda row: row.get("seconds", {}).get("pruned", math.nan),
}
"""Columns by name: accuracies and shares in per cent, drops in points (negative: worse).

`latency_share` is of the dense model in the same run: what was paired; latencies in ms are of
different hours.
"""


def _drop(row: Result, name: str) -> float:
    return 100 * (row["pruned"][name] - row["dense"][name])


def line(kind: Kind, rows: Sequence[Result]) -> Line:
    """Average results of one kind."""
    seeds = {row["seed"] for row in rows}
    targets = tuple(sorted({row["target_domain"] for row in rows}))
    there = {(row["seed"], row["target_domain"]) for row in rows}
    ratio = kind.budget[1] if kind.budget[0] == "ratio" else None
    return Line(
        kind,
        len(rows),
        len(seeds),
        targets,
        sum(kept(row) == START for row in rows),
        len(seeds) * len(targets) - len(there),
        {name: mean(rows, value) for name, value in COLUMNS.items()},
        cited(frozenset(kind.data), kind.model, kind.metric, ratio),
    )


def mean(rows: Sequence[Result], value: Callable[[Result], float]) -> Mean:
    """Mean over unseen domains, then seeds; its error from the seeds that have all domains.

    Examples
    --------
    >>> rows = [{"seed": s, "target_domain": d, "x": s + 10 * (d == "a")}
    ...         for s in (0, 2) for d in "ab"]
    >>> mean(rows, lambda row: row["x"])
    Mean(value=6.0, error=1.0)
    """
    by_target: defaultdict[str, list[float]] = defaultdict(list)
    by_seed: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        by_target[row["target_domain"]].append(value(row))
        by_seed[row["seed"]][row["target_domain"]] = value(row)
    whole = [
        statistics.fmean(values.values())
        for values in by_seed.values()
        if len(values) == len(by_target)
    ]
    middle = statistics.fmean(statistics.fmean(values) for values in by_target.values())
    error = statistics.stdev(whole) / math.sqrt(len(whole)) if len(whole) > 1 else None
    return Mean(middle, error)
