"""Finds results in a directory, and says which of them are of one kind.

Results of one kind differ in seed and unseen domain alone; they are what a mean is taken over.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.escapes import readable
from cli.output import note
from cli.reports.expected import is_result
from cli.running.kept import START, kept
from cli.running.settings import CONTROLS
from depgraph import DepgraphError
from depgraph.storing.reading import read_text
from pruners import METRICS

_VARIED = ("model", "share", "seed", "control", "timing", "device", "dense_from", "weights")
"""Settings that make no other kind of a result: named apart, or without a part in it."""


@dataclass(frozen=True)
class Kind:
    """What results of one kind have in common.

    Attributes
    ----------
    data : tuple of str
        The domains, sorted.
    model, metric : str
        `metric` is the control's name for a control.
    budget : tuple
        ``("ratio" | "macs" | "params" | ..., share)``; ``("none", 0.0)`` where nothing was cut.
    variant : str
        Other settings, where results in the same directory differ in them: ``"scope=uniform"``.
    """

    data: tuple[str, ...]
    model: str
    metric: str
    budget: tuple[str, float]
    variant: str = ""

    @property
    def metric_says(self) -> str:
        """The metric or control for people, with the variant."""
        name = "dense, trained on" if self.metric == "dense" else self.metric
        return f"{name} ({self.variant})" if self.variant else name

    @property
    def budget_says(self) -> str:
        """The budget for people."""
        name, share = self.budget
        if name == "none":
            return "nothing cut"
        if name == "ratio":
            return f"{100 * share:g}% of units cut"
        return f"{100 * share:g}% of {_NOUNS.get(name, name)} kept"


_NOUNS = {"macs": "MACs", "params": "parameters"}

Result = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What is in a directory.

    Attributes
    ----------
    results : dict of Kind to tuple of results
        Sorted for a table.
    failed : dict of str to str
        Directories with their errors.
    unfinished : int
        Runs of a sweep that were begun and have neither result nor error.
    """

    results: dict[Kind, tuple[Result, ...]]
    failed: dict[str, str]
    unfinished: int

    @property
    def runs(self) -> int:
        """Number of results."""
        return sum(map(len, self.results.values()))

    @property
    def kept_start(self) -> int:
        """Number of results whose training after the cut did not improve the model."""
        return sum(kept(row) == START for rows in self.results.values() for row in rows)


def collect(root: Path) -> Found:
    """Read every ``result.json`` below a directory.

    Parameters
    ----------
    root : Path
        Of a `run`, a `demo`, a `sweep`, or several of them.

    Raises
    ------
    DepgraphError
        Where there is none.
    """
    results = [row for path in sorted(root.rglob("result.json")) if (row := _read(path))]
    if not results:
        raise DepgraphError(f"there is no result below '{root}'; give what run or sweep wrote to")
    grouped: defaultdict[Kind, list[Result]] = defaultdict(list)
    for row in results:
        grouped[_kind(row)].append(row)
    split = {kind: rows for whole in grouped.items() for kind, rows in _variants(*whole)}
    failed = {
        readable(str(path.parent.relative_to(root))): _first_line(path)
        for path in sorted(root.rglob("error.txt"))
    }
    begun = [path.parent for path in root.rglob("config.json")]
    ended = ("result.json", "error.txt", "model.safetensors")  # the last: a saved model's config
    unfinished = sum(not any((place / name).exists() for name in ended) for place in begun)
    models = list(dict.fromkeys(row["model"] for row in results))
    order = sorted(split, key=lambda kind: _order(kind, models))
    return Found({kind: tuple(split[kind]) for kind in order}, failed, unfinished)


def _first_line(path: Path) -> str:
    try:
        return readable(read_text(path.parent, path.name).partition("\n")[0])
    except DepgraphError as error:
        return str(error)


def _read(path: Path) -> Result | None:
    try:
        row = readable(json.loads(read_text(path.parent, path.name)))
    except (ValueError, RecursionError) as error:  # DepgraphError among them
        note(f"note: '{path}' cannot be read ({error}); it is left out")
        return None
    if not is_result(row):
        note(f"note: '{path}' is no result of a run; it is left out")
        return None
    result: Result = row
    return result


def _kind(row: Result) -> Kind:
    target = row.get("target") or {}
    budget = ("ratio", row["ratio"]) if row.get("ratio") else next(iter(target.items()), None)
    name, share = budget or ("none", 0.0)
    domains = tuple(sorted(row["dense"]["accuracy"]))
    return Kind(domains, row["model"], row["metric"], (str(name), float(share)))


def _variants(kind: Kind, rows: list[Result]) -> Iterator[tuple[Kind, list[Result]]]:
    """The results of one kind, apart by other settings in which they differ."""
    flat = [dict(_flat(row.get("settings", {}))) for row in rows]
    names = sorted({name for settings in flat for name in settings})
    differ = [n for n in names if len({settings.get(n) for settings in flat}) > 1]
    parts: defaultdict[str, list[Result]] = defaultdict(list)
    for row, settings in zip(rows, flat, strict=True):
        parts[", ".join(f"{n.removeprefix('pruning.')}={settings.get(n)}" for n in differ)].append(
            row
        )
    for variant, part in parts.items():
        yield Kind(kind.data, kind.model, kind.metric, kind.budget, variant), part


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if name in _VARIED or prefix + name == "pruning.metric":
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def _order(kind: Kind, models: Sequence[str]) -> tuple[Any, ...]:
    metrics = [*METRICS, *CONTROLS]
    place = metrics.index(kind.metric) if kind.metric in metrics else len(metrics)
    name, share = kind.budget
    removed = share if name in ("ratio", "none") else 1 - share
    return kind.data, models.index(kind.model), name, removed, place, kind.metric, kind.variant
