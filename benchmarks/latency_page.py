"""The latency suite as a page: a table and a plot from pytest-benchmark's JSON.

``pytest benchmarks --benchmark-only --benchmark-json suite.json``, then
``python -m benchmarks.latency_page suite.json --markdown docs/latency.md``. Of several files, each
a run of its own, a later one's cases take the place of the same cases before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.pages import markdown_table, png
from cli.output import table, write_bytes, write_text
from depgraph import DepgraphError

CASE = ("model", "device", "precision", "batch", "ratio", "runtime")
COLUMNS = (*CASE, "MACs kept", "dense, ms", "pruned, ms", "speed-up", "speed-up x MACs")


def cases(files: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each case of the suite, sorted; of the same case, the last file's.

    Raises
    ------
    DepgraphError
        For a file that the suite did not write.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in files:
        try:
            runs = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
            for run in runs:
                key = tuple(run["params"][name] for name in CASE)
                found[key] = {**run["params"], **run["extra_info"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DepgraphError(
                f"'{file}' is no --benchmark-json of the latency suite: {error!r}"
            ) from error
    return [found[key] for key in sorted(found, key=_order)]


def _order(key: tuple[str, ...]) -> tuple[Any, ...]:
    model, device, precision, batch, ratio, runtime = key
    return model, device, precision, int(batch), float(ratio), runtime


def lines_of(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows as texts."""
    return [
        (
            *(str(row[name]) for name in CASE),
            f"{row['speedup_over_macs'] / row['speedup']:.3f}",
            f"{row['dense_ms']:.1f}",
            f"{row['pruned_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_over_macs']:.2f}",
        )
        for row in rows
    ]


def _plot(rows: list[dict[str, Any]]) -> bytes:
    """Milliseconds of the dense and the pruned model, a pair of bars for each case."""
    names = [" ".join(str(row[name]) for name in CASE if name != "device") for row in rows]
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(rows)))
    axes = figure.subplots()
    places = range(len(rows))
    for shift, key, colour in ((0.2, "dense_ms", "C7"), (-0.2, "pruned_ms", "C0")):
        times = [row[key] / int(row["batch"]) for row in rows]
        label = key.removesuffix("_ms")
        axes.barh([p + shift for p in places], times, 0.4, color=colour, label=label)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms for an image")
    axes.legend(loc="lower right")
    return png(figure)


def _markdown(rows: list[dict[str, Any]], files: Sequence[Path], picture: str) -> str:
    machine = json.loads(files[-1].read_text(encoding="utf-8"))["machine_info"]
    device = f"{machine['cpu']['brand_raw']}, {machine['threads']} threads"
    device += f", {machine['gpu']}" if machine["gpu"] else ", no GPU at hand"
    return (
        "# Latency\n\nMade by `pytest benchmarks --benchmark-only --benchmark-json suite.json`, "
        "with `--runtime`, `--batch`, ... as the table has them, and "
        "`python -m benchmarks.latency_page suite.json --markdown docs/latency.md`, on "
        f"{device}, torch {machine['torch']}. Dense and pruned model in turns in one "
        "process, random weights, L2, *ratio* of the units removed; milliseconds of a batch, "
        "medians; the speed-up is the median of the rounds' own. In the last column 1 is where "
        "time falls as MACs do.\n\n"
        f"![Milliseconds for an image]({picture})\n\n{markdown_table(COLUMNS, lines_of(rows))}"
    )


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="With a plot.")
def main(files: tuple[Path, ...], markdown: Path | None) -> None:
    """Show what the suite measured."""
    rows = cases(files)
    if markdown is not None:
        picture = markdown.with_suffix(".png")
        write_bytes(picture, _plot(rows))
        write_text(markdown, _markdown(rows, files, picture.name))
    Console().print(table("latency", COLUMNS, lines_of(rows)))


if __name__ == "__main__":
    main()
