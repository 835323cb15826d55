"""Writes a study down: Markdown, CSV, LaTeX, and one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cli import escapes
from cli.output import environment
from cli.reports import plots
from cli.reports.average import COLUMNS, Line, Mean
from cli.reports.collect import Found, Kind, Result
from cli.reports.paper import PACS, SOURCE
from cli.showing.html import html_environment


@dataclass(frozen=True)
class Part:
    """The lines of one set of data, and of one model of it where plots are made."""

    title: str
    lines: tuple[Line, ...]

    @property
    def cited(self) -> bool:
        """Whether the paper has figures to stand beside these."""
        return any(line.paper for line in self.lines)


def by_data(lines: Sequence[Line]) -> list[Part]:
    """The lines apart by their data, which no mean or plot may mix."""
    keys = dict.fromkeys(line.kind.data for line in lines)
    return [
        Part(
            "PACS" if frozenset(data) == PACS else ", ".join(data),
            tuple(line for line in lines if line.kind.data == data),
        )
        for data in keys
    ]


def markdown(found: Found, lines: Sequence[Line]) -> str:
    """All tables in Markdown."""
    return _text("study.md.j2", escapes.markdown, found, lines)


def latex(found: Found, lines: Sequence[Line]) -> str:
    """All tables in LaTeX, for the packages booktabs and longtable."""
    return _text("study.tex.j2", escapes.tex, found, lines)


def _text(template: str, escape: Callable[[Any], str], found: Found, lines: Sequence[Line]) -> str:
    texts = escapes.templates(escape)
    texts.filters |= _FILTERS
    values = {"found": found, "parts": by_data(lines), "source": SOURCE, **environment()}
    return texts.get_template(template).render(values)


def table_csv(lines: Sequence[Line]) -> str:
    """One row a line of the table, with the standard errors."""
    header = ["data", "model", "metric", "budget", "share", "variant", "runs", "seeds", "targets"]
    for name in COLUMNS:
        header += [name, f"{name}_stderr"]
    rows = []
    for line in lines:
        kind = line.kind
        row: list[Any] = [" ".join(kind.data), kind.model, kind.metric, *kind.budget, kind.variant]
        row += [line.runs, line.seeds, len(line.targets)]
        for mean in line.values.values():
            row += [mean.value, mean.error]
        rows.append(row)
    return escapes.csv_text(header, rows)


def runs_csv(found: Found) -> str:
    """One row a run."""
    header = ["model", "metric", "budget", "share", "variant", "target_domain", "seed", *COLUMNS]
    rows = [
        [
            kind.model,
            kind.metric,
            *kind.budget,
            kind.variant,
            row["target_domain"],
            row["seed"],
            *(value(row) for value in COLUMNS.values()),
        ]
        for kind, part in found.results.items()
        for row in part
    ]
    return escapes.csv_text(header, rows)


_LATENCY = "latency, % of the dense model's in the same run"


def page(found: Found, lines: Sequence[Line]) -> str:
    """The study as one HTML page, without any other file."""
    html = html_environment()
    html.filters |= _FILTERS
    parts = by_data(lines)
    sections = [section for part in parts for section in _sections(found, part)]
    values = {"found": found, "parts": parts, "sections": sections, "source": SOURCE}
    workers = max((row.get("sweep", {}).get("workers", 1) for row in _rows(found)), default=1)
    return html.get_template("study.html.j2").render(values, workers=workers, **environment())


def _rows(found: Found) -> list[Result]:
    return [row for part in found.results.values() for row in part]


def _sections(found: Found, part: Part) -> list[dict[str, Any]]:
    """The plots of each model."""
    names = [line.kind.metric_says for line in part.lines]
    colours = plots.palette(names)
    out = []
    for model in dict.fromkeys(line.kind.model for line in part.lines):
        lines = [line for line in part.lines if line.kind.model == model]
        budgets: dict[tuple[str, float], dict[Kind, tuple[Result, ...]]] = {}
        for line in lines:
            if line.kind.budget[0] != "none":
                rows = found.results[line.kind]
                budgets.setdefault(line.kind.budget, {})[line.kind] = rows
        out.append(
            {
                "model": model,
                "data": part.title,
                "pareto": [
                    plots.pareto(lines, cost, says, colours)
                    for cost, says in (("macs", "MACs"), ("latency_share", _LATENCY))
                ],
                "budgets": [
                    {
                        "title": next(iter(results)).budget_says,
                        "bars": plots.domain_bars(results, colours),
                        "kept": plots.kept_tables(results),
                        # At other budgets it is the same scores, cut elsewhere.
                        "scores": None if i else plots.score_histograms(results),
                        "curves": plots.curves(results, colours),
                    }
                    for i, results in enumerate(budgets.values())
                ],
            }
        )
    return out


def _plain(mean: Mean, digits: int = 1, sign: str = "") -> str:
    text = f"{mean.value:{sign}z.{digits}f}".replace("-", "−")
    return text if mean.error is None else f"{text} ± {mean.error:.{digits}f}"


def _math(mean: Mean, digits: int = 1, sign: str = "") -> escapes.Raw:
    text = f"{mean.value:{sign}z.{digits}f}"
    error = "" if mean.error is None else f" \\pm {mean.error:.{digits}f}"
    return escapes.Raw(f"${text}{error}$")


def _amount(value: float) -> str:
    """A number with a prefix: 12.3 M, 4.56 G."""
    for size, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


_FILTERS = {"plain": _plain, "math": _math, "amount": _amount}
