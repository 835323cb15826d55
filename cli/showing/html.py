"""Self-contained HTML pages: the report of a run, and the groups of a model."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from plotly.offline import get_plotlyjs

from cli.escapes import readable
from cli.output import percent
from cli.running.kept import selection_says
from cli.showing import figures
from cli.showing.speed import PAIRED, speed_says
from domains import DomainData


def html_environment() -> Environment:
    """Templates of the package, with filters for numbers."""
    environment = Environment(
        loader=PackageLoader("cli"), autoescape=select_autoescape(["j2", "html"])
    )
    environment.filters["percent"] = percent
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}".replace("-", "−")
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment


def template(name: str) -> Template:
    """A template of the package, with the filters of all of them."""
    return html_environment().get_template(name)


def report_page(result: dict[str, Any], data: DomainData) -> str:
    """The page of one run: what was done, how good, how fast, and what is gone.

    Parameters
    ----------
    result : dict
        The row of `cli.running.pipeline.run_pipeline`.
    data : DomainData
        For the sample images.

    Returns
    -------
    str
        HTML that needs no other file and no network.
    """
    result = readable(result)
    return template("report.html.j2").render(
        result=result,
        accuracy=figures.accuracy_bars(result),
        kept=figures.kept_map(result),
        latency=figures.latency_bars(result),
        curves=figures.training_curves(result),
        samples=readable(figures.sample_images(data)),
        speed=speed_says(result["speedup"], result.get("speedup_interval")).partition(" ")[::2],
        paired=PAIRED.format(rounds=result["dense"]["timing"]["rounds"]),
        selection=selection_says(result),
        settings=json.dumps(result["settings"], indent=1),
    )


def inspect_page(result: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """The page of a model's groups, to explore by clicks.

    Parameters
    ----------
    result : dict
        As `inspect --json` prints it.
    groups : list of dict
        See `cli.showing.explore.explore`.

    Returns
    -------
    str
        HTML that needs no other file and no network: plotly's own script is in it.
    """
    shown = [{**a, **b} for a, b in zip(result["groups"], groups, strict=True)]
    return template("inspect.html.j2").render(
        result=result,
        groups=shown,
        columns=len({group["place"] for group in shown}),
        plotly=get_plotlyjs(),
    )
