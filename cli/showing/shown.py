"""A result row on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.output import emit, percent, table
from cli.running.kept import pruned_says, selection_says
from cli.showing.speed import speed_says


def show(result: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print a result row, and where its page is."""
    target = result["target_domain"]
    rows = [
        (
            name + (" (unseen)" if name == target else ""),
            *(percent(result[key]["accuracy"][name]) for key in ("dense", "pruned_only", "pruned")),
        )
        for name in result["dense"]["accuracy"]
    ]
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        rows.append((label, f"{result['dense'][key]:,}", "", f"{result['pruned'][key]:,}"))
    dense, small = (f"{result[key]['latency_ms']:.2f}" for key in ("dense", "pruned"))
    speed = speed_says(result["speedup"], result.get("speedup_interval"))
    rows.append(("latency, ms", dense, "", f"{small}, {speed}"))
    columns = ["", "dense", "pruned, not trained", pruned_says(result)]
    title = f"{result['model']}, metric {result['metric']}"
    emit({**result, "report": str(out / "report.html")}, as_json, table(title, columns, rows))
    if not as_json:
        click.echo(selection_says(result))
        click.echo(f"\nreport: {(out / 'report.html').resolve()}")
