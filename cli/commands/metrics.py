"""``metrics``: what `--metric` can be, what each looks at, and the paper it is from."""

from __future__ import annotations

import inspect
from typing import Any

import click
from rich.table import Table

import pruners
from cli.options.shared import json_option
from cli.output import emit


@click.command()
@json_option
def metrics(as_json: bool) -> None:
    """List the metrics that units can be scored with."""
    rows = [describe(cls) for cls in pruners.METRICS.values()]
    table = Table(title="metrics", title_justify="left")
    for heading, width in (("name", 12), ("data", 4), ("additive", 8)):
        table.add_column(heading, min_width=width, no_wrap=True)
    table.add_column("scores a unit by", overflow="fold", ratio=3)
    table.add_column("reference", overflow="fold", ratio=4)
    for row in rows:
        marks = ("yes" if row[key] else "" for key in ("needs_data", "additive"))
        table.add_row(row["name"], *marks, row["says"], row["reference"])
    notes = Table(show_header=False, box=None)
    notes.add_row("data: looks at images (--data)")
    notes.add_row("additive: rises of the loss, ranked as they are, by the MACs that a unit saves")
    emit({"metrics": rows}, as_json, table, notes)


def describe(metric: Any) -> dict[str, Any]:
    """A metric class as plain data, its words from its docstring.

    Parameters
    ----------
    metric : type
        See `pruners.Metric`.

    Returns
    -------
    dict
        ``name``, ``needs_data``, ``additive``, ``says`` (first line) and ``reference``; the
        last two are empty where there is no docstring.
    """
    text = inspect.cleandoc(metric.__doc__ or "")
    _, _, cited = text.partition("References\n----------\n")
    paragraph = " ".join(cited.partition("\n\n")[0].split())
    return {
        "name": metric.name,
        "needs_data": bool(metric.needs_data),
        "additive": bool(getattr(metric, "additive", False)),
        "says": text.partition("\n")[0],
        "reference": paragraph,
    }
