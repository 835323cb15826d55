"""Figures of a result as inline SVG that reads on light and on dark paper."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cli.running.kept import pruned_says, start
from cli.showing.drawing import INK, STYLE, WIDTH, svg
from domains import DomainData

COLOURS = {"dense": "#4c8dd6", "pruned_only": "#b6a36a", "pruned": "#3fa66a"}


def accuracy_bars(result: dict[str, Any]) -> str:
    """Accuracy per domain: dense, right after pruning, and fine-tuned again."""
    target, says = result["target_domain"], _says(result)
    names = list(result["dense"]["accuracy"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6))
        axes = figure.add_subplot()
        for i, (key, colour) in enumerate(COLOURS.items()):
            shares = [100 * result[key]["accuracy"][name] for name in names]
            places = [x + (i - 1) * 0.27 for x in range(len(names))]
            bars = axes.bar(places, shares, 0.25, color=colour, label=says[key])
            axes.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1)
        labels = [f"{name}\n(unseen)" if name == target else name for name in names]
        axes.set_xticks(range(len(names)), labels)
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 108)
        axes.legend(
            frameon=False,
            ncols=3,
            loc="lower center",
            bbox_to_anchor=(0.45, 1.0),
            fontsize=8.5,
            columnspacing=1.0,
            handlelength=1.2,
        )
        return svg(figure, "Accuracy on each domain, dense and pruned")


def _says(result: dict[str, Any]) -> dict[str, str]:
    """How the models of a result are called."""
    return {
        "dense": "dense",
        "pruned_only": "pruned, not trained",
        "pruned": pruned_says(result),
    }


def kept_map(result: dict[str, Any]) -> str:
    """Share of units kept, by place in the network and kind of group."""
    kinds = list(dict.fromkeys(group["kind"] for group in result["groups"]))
    counts: dict[str, dict[str, Counter[str]]] = {}
    for group in result["groups"]:
        found = re.search(r"\.(\d+)(?:\.|$)", group["name"])
        place = f"block {found[1]}" if found else "whole network"
        sums = counts.setdefault(place, {}).setdefault(group["kind"], Counter())
        sums.update(kept=group["kept"], size=group["size"])
    places = {
        place: {kind: sums["kept"] / sums["size"] for kind, sums in of_kind.items()}
        for place, of_kind in counts.items()
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.24 * len(places)))
        axes = figure.add_subplot()
        for y, shares in enumerate(places.values()):
            for kind, share in shares.items():
                x = kinds.index(kind)
                axes.barh(y, 0.56, 0.86, left=x, color=INK, alpha=0.15)
                axes.barh(y, 0.56 * share, 0.86, left=x, color=COLOURS["pruned"], alpha=0.8)
                axes.text(x + 0.59, y, f"{100 * share:.0f}%", va="center", fontsize=8)
        axes.set_yticks(range(len(places)), list(places))
        axes.set_xticks([x + 0.28 for x in range(len(kinds))], kinds)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.set_xlim(0, len(kinds))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, "Share of units kept in each block, by kind")


def latency_bars(result: dict[str, Any]) -> str:
    """Latencies that were paired: the dense median, and the pruned one by the median ratio."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3))
        axes = figure.add_subplot()
        timings = [result[key]["timing"] for key in ("dense", "pruned")]
        ends = []
        for y, (key, timing) in enumerate(zip(("dense", "pruned"), timings, strict=True)):
            middle = timing["latency_ms"]
            low, high = _spread(result, key)
            ends.append(high)
            axes.barh(y, middle, 0.6, color=COLOURS[key])
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color=INK, capsize=3)
            axes.annotate(
                f"{middle:.1f} ms",
                (high, y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks([0, 1], ["dense", "pruned"])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(ends))
        axes.set_xlabel("ms a batch; bars: dense, interquartile range; pruned, 95% of the ratio")
        return svg(figure, "Latency of the dense and the pruned model")


def _spread(result: dict[str, Any], key: str) -> tuple[float, float]:
    """Ends of an error bar: of the dense latencies, or of the ratio to them."""
    timing, interval = result[key]["timing"], result.get("speedup_interval")
    middle = timing["latency_ms"]
    if key == "dense" or interval is None:
        half = timing["latency_iqr_ms"] / 2
        return max(0.0, middle - half), middle + half
    dense = result["dense"]["timing"]["latency_ms"]
    return min(middle, dense / interval[1]), max(middle, dense / interval[0])


def training_curves(result: dict[str, Any]) -> str | None:
    """Validation accuracy on the sources over epochs, before and after pruning.

    Epoch 0 is the model that a training started from, where that was judged too.
    """
    says = _says(result)
    histories = {name: rows for name, rows in result["history"].items() if rows}
    if not histories:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2))
        axes = figure.add_subplot()
        for name, rows in histories.items():
            before = start(result) if name == "pruned" else None
            epochs = [*([] if before is None else [0]), *(row["epoch"] for row in rows)]
            judged = [*([] if before is None else [before]), *(r["val_accuracy"] for r in rows)]
            shares = [100 * accuracy for accuracy in judged]
            # Trainings of a schedule, between the two, are told apart by their lines' names.
            look: dict[str, Any] = (
                {"color": COLOURS[name]} if name in COLOURS else {"linestyle": "--"}
            )
            axes.plot(epochs, shares, marker="o", label=says.get(name, name), **look)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        return svg(figure, "Validation accuracy over epochs")


def sample_images(data: DomainData, count: int = 8, side: int = 64) -> dict[str, list[str]]:
    """A few images of each domain, of different classes, as data URIs.

    Parameters
    ----------
    data : DomainData
    count : int
        Images a domain.
    side : int
        Pixels they are scaled to.

    Returns
    -------
    dict of str to list of str
    """
    out: dict[str, list[str]] = {}
    for domain, samples in data.samples.items():
        first = {sample.label: sample for sample in reversed(samples)}
        chosen: Sequence[Any] = [first[label] for label in sorted(first)][:count]
        out[domain] = [_thumbnail(sample.path, side) for sample in chosen]
    return out


def _thumbnail(path: Any, side: int) -> str:
    with Image.open(path) as image:
        small = image.convert("RGBA")
        small.thumbnail((side, side))
        paper = Image.new("RGBA", small.size, "white")
        paper.alpha_composite(small)
    buffer = io.BytesIO()
    paper.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
