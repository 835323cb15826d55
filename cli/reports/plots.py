"""Plots of a study: fronts, bars by unseen domain, where units went, scores, training curves."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cli.reports.average import Line
from cli.reports.collect import Kind, Result
from cli.running.kept import start
from cli.showing.drawing import INK, STYLE, WIDTH, svg

_PALETTE = (
    "#4c8dd6",
    "#e08a3c",
    "#3fa66a",
    "#d65f7a",
    "#8f7ad6",
    "#2aa3a3",
    "#b6a36a",
    "#c85fc0",
    "#7a9a3a",
    "#a8705a",
)
_MARKERS = "osD^vP*X"
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "ncols": 4,
    "loc": "lower center",
    "bbox_to_anchor": (0.45, 1.0),
    "fontsize": 8.5,
    "columnspacing": 1.0,
    "handlelength": 1.2,
}


def palette(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; the same on all plots of a study."""
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both: less of the first, more of the second.

    Examples
    --------
    >>> front([(1, 50), (2, 40), (3, 60)])
    [(1, 50), (3, 60)]
    """
    out: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not out or point[1] > out[-1][1]:
            out.append(point)
    return out


def pareto(lines: Sequence[Line], cost: str, says: str, colours: Mapping[str, str]) -> str:
    """Accuracy on the unseen domain against a cost, by metric, with the front of all.

    Parameters
    ----------
    lines : sequence of Line
        Of one model.
    cost : str
        ``"latency_share"`` or ``"macs"``.
    says : str
        The cost with its unit, for the axis.
    colours : mapping of str to str
        By name, see `palette`.
    """
    names = {line.kind: line.kind.metric_says for line in lines}
    prefix, scale = ("", 1.0) if cost != "macs" else ("M", 1e6)
    if cost == "macs" and max(line.values[cost].value for line in lines) > 1e9:
        prefix, scale = "G", 1e9
    says = f"{prefix}{says}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0))
        axes = figure.add_subplot()
        series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for line in lines:
            x, y = line.values[cost].value / scale, line.values["unseen"]
            series[names[line.kind]].append((x, y.value))
            axes.errorbar(x, y.value, yerr=y.error, color=colours[names[line.kind]], alpha=0.5)
        for i, (name, points) in enumerate(series.items()):
            marker = _MARKERS[i % len(_MARKERS)]
            axes.plot(
                *zip(*sorted(points), strict=True),
                linewidth=0.8,
                marker=marker,
                markersize=5,
                color=colours[name],
                label=name,
            )
        best = front([point for points in series.values() for point in points])
        axes.plot(
            *zip(*best, strict=True),
            drawstyle="steps-post",
            color=INK,
            linestyle=":",
            label="front",
        )
        dense = [line.values[f"dense_{cost}"].value / scale for line in lines]
        unseen = [line.values["dense_unseen"].value for line in lines]
        axes.plot(statistics.fmean(dense), statistics.fmean(unseen), "*", color=INK, markersize=11)
        axes.annotate(
            "dense",
            (statistics.fmean(dense), statistics.fmean(unseen)),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
        axes.set_xlabel(says)
        axes.set_ylabel("unseen domain, %")
        axes.set_xlim(left=0)
        axes.legend(**_LEGEND)
        return svg(figure, f"Accuracy on the unseen domain against {says}")


def domain_bars(results: Mapping[Kind, Sequence[Result]], colours: Mapping[str, str]) -> str:
    """Accuracy on each domain when it is the unseen one, dense and by metric."""
    names = {kind: kind.metric_says for kind in results}
    rows = [row for part in results.values() for row in part]
    targets = sorted({row["target_domain"] for row in rows})
    bars = {"dense": _by_target(rows, "dense")}
    bars |= {names[kind]: _by_target(part, "pruned") for kind, part in results.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6))
        axes = figure.add_subplot()
        width = 0.84 / len(bars)
        for i, (name, shares) in enumerate(bars.items()):
            there = [(x, shares[target]) for x, target in enumerate(targets) if target in shares]
            axes.bar(
                [x + (i - (len(bars) - 1) / 2) * width for x, _ in there],
                [share for _, share in there],
                0.9 * width,
                color=colours.get(name, INK),
                label=name,
            )
        axes.set_xticks(range(len(targets)), targets)
        axes.set_ylabel("accuracy when unseen, %")
        axes.legend(**_LEGEND)
        return svg(figure, "Accuracy on each domain when it is the unseen one")


def _by_target(rows: Sequence[Result], which: str) -> dict[str, float]:
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        shares[row["target_domain"]].append(100 * row[which]["target_accuracy"])
    return {target: statistics.fmean(values) for target, values in shares.items()}


def kept_tables(results: Mapping[Kind, Sequence[Result]]) -> list[dict[str, Any]]:
    """Per cent of the units kept, block by block and by metric: a table for each kind of group.

    Returns
    -------
    list of dict
        ``"kind"``, ``"metrics"`` and ``"rows"``: (place, one number or None for each metric).
    """
    names = {kind: kind.metric_says for kind in results}
    shares: dict[str, dict[str, dict[str, float]]] = {}  # kind of group, place, metric
    for kind, rows in results.items():
        for (group_kind, place), share in _kept(rows).items():
            shares.setdefault(group_kind, {}).setdefault(place, {})[names[kind]] = 100 * share
    metrics = list(names.values())
    return [
        {
            "kind": group_kind,
            "metrics": metrics,
            "rows": [
                (place, [row.get(name) for name in metrics])
                for place, row in sorted(places.items(), key=lambda item: _number(item[0]))
            ],
        }
        for group_kind, places in shares.items()
    ]


def _number(place: str) -> int:
    return int("".join(filter(str.isdigit, place)) or -1)


def _kept(rows: Sequence[Result]) -> dict[tuple[str, str], float]:
    """Mean share kept, by kind of group and place."""
    kept: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for group in row.get("groups", []):
            found = re.search(r"\.(\d+)(?:\.|$)", group["name"])
            place = f"block {found[1]}" if found else "network"
            kept[group["kind"], place].append(group["kept"] / group["size"])
    return {key: statistics.fmean(values) for key, values in kept.items()}


def score_histograms(results: Mapping[Kind, Sequence[Result]]) -> str | None:
    """Distributions of the scores in one run of each metric: what stays, and what goes."""
    names = {kind: kind.metric_says for kind in results}
    rows = {
        names[kind]: next((row["scores"] for row in part if row.get("scores")), None)
        for kind, part in results.items()
    }
    scores = {name: by_kind for name, by_kind in rows.items() if by_kind}
    if not scores:
        return None
    kinds = list(dict.fromkeys(kind for by_kind in scores.values() for kind in by_kind))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 * len(scores) + 0.5))
        panels = figure.subplots(len(scores), len(kinds), squeeze=False)
        for line, (name, by_kind) in zip(panels, scores.items(), strict=True):
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)
            for axes, kind in zip(line, kinds, strict=True):
                axes.set_yticks([])
                axes.tick_params(labelsize=7)
                axes.xaxis.set_major_locator(MaxNLocator(2))
                if kind in by_kind:
                    _histogram(axes, by_kind[kind])
        for axes, kind in zip(panels[0], kinds, strict=True):
            axes.set_title(kind, fontsize=9)
        figure.subplots_adjust(hspace=0.75, wspace=0.15)
        return svg(figure, "Distribution of scores by metric and kind of group")


def _histogram(axes: Any, bins: Mapping[str, Sequence[float]]) -> None:
    edges = bins["log10"]
    for key, colour in (("removed", "#d65f7a"), ("kept", "#3fa66a")):
        axes.stairs(bins[key], edges, fill=True, color=colour, alpha=0.6)


def curves(results: Mapping[Kind, Sequence[Result]], colours: Mapping[str, str]) -> str | None:
    """Validation accuracy over the epochs after pruning, averaged over seeds and unseen domains."""
    names = {kind: kind.metric_says for kind in results}
    averaged = {names[kind]: _mean_curve(rows) for kind, rows in results.items()}
    shown = {name: curve for name, curve in averaged.items() if curve}
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4))
        axes = figure.add_subplot()
        for name, curve in shown.items():
            axes.plot(*zip(*curve, strict=True), marker=".", color=colours[name], label=name)
        axes.set_xlabel("epoch after pruning")
        axes.set_ylabel("sources, validation, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        last = max(epoch for curve in shown.values() for epoch, _ in curve)
        first = min(epoch for curve in shown.values() for epoch, _ in curve)
        axes.set_xlim(first - 0.3, last + 0.3)
        axes.legend(**_LEGEND)
        return svg(figure, "Validation accuracy over the epochs after pruning")


def _mean_curve(rows: Sequence[Result]) -> list[tuple[int, float]]:
    values: defaultdict[int, list[float]] = defaultdict(list)
    starts = [start(row) for row in rows]
    for row, before in zip(rows, starts, strict=True):
        if before is not None and None not in starts:  # a mean of some would not be comparable
            values[0].append(100 * before)
        for epoch in row.get("history", {}).get("pruned", []):
            values[epoch["epoch"]].append(100 * epoch["val_accuracy"])
    return [(epoch, statistics.fmean(shares)) for epoch, shares in sorted(values.items())]
