"""``report``: tables and plots of all results below a directory."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options.shared import json_option
from cli.output import emit, table, write_text
from cli.reports import write
from cli.reports.average import Line, Mean, line
from cli.reports.collect import collect
from cli.running.made import check_files, force_option
from cli.showing.speed import speed_says


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the report  [DIRECTORY/report].",
)
@force_option
@json_option
def report(directory: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Average all results of `run`, `demo` and `sweep` below DIRECTORY, and draw them.

    Writes report.html (needs no other file), report.md, table.csv, runs.csv and tables.tex.
    """
    found = collect(directory)
    lines = [line(kind, rows) for kind, rows in found.results.items()]
    out = out or directory / "report"
    texts = {
        "report.html": write.page(found, lines),
        "report.md": write.markdown(found, lines),
        "table.csv": write.table_csv(lines),
        "runs.csv": write.runs_csv(found),
        "tables.tex": write.latex(found, lines),
    }
    check_files((out / name for name in texts), force)
    for name, text in texts.items():
        write_text(out / name, text)
    result = {
        "runs": found.runs,
        "kept_start": found.kept_start,
        "failed": found.failed,
        "unfinished": found.unfinished,
        "table": [_plain(part) for part in lines],
        "files": [str(out / name) for name in texts],
    }
    columns = ["model", "metric", "budget", "sources, %", "unseen, %", "change", "speed", "runs"]
    emit(result, as_json, table(f"{found.runs} runs", columns, [_row(part) for part in lines]))
    if not as_json:
        click.echo(f"\nreport: {(out / 'report.html').resolve()}")


def _plain(part: Line) -> dict[str, object]:
    kind = part.kind
    values = {name: [mean.value, mean.error] for name, mean in part.values.items()}
    return {
        "model": kind.model,
        "metric": kind.metric,
        "budget": list(kind.budget),
        "variant": kind.variant,
        "domains": list(kind.data),
        "runs": part.runs,
        "seeds": part.seeds,
        "kept_start": part.kept_start,
        **values,
    }


def _row(part: Line) -> list[str]:
    kind, values = part.kind, part.values
    shown = [_text(values[name]) for name in ("source", "unseen", "unseen_drop")]
    speed = speed_says(values["speedup"].value)
    return [kind.model, kind.metric_says, kind.budget_says, *shown, speed, str(part.runs)]


def _text(mean: Mean) -> str:
    return f"{mean.value:.1f}" + ("" if mean.error is None else f" ± {mean.error:.1f}")
