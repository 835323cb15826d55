"""``inspect``: what can be pruned, and what cannot and why; no weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import depgraph
from cli.html import inspect_page
from cli.models import example_inputs, load_model
from cli.options import json_option, model_options
from cli.output import check_replaceable, emit, table, write_text
from depgraph import DependencyGraph


@click.command()
@model_options
@click.option("--graphml", type=click.Path(path_type=Path, dir_okay=False), help="Graph file.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Page of groups.")
@json_option
def inspect(
    model_name: str,
    pretrained: bool,
    weights: Path | None,
    img_size: int | None,
    num_classes: int | None,
    model_args: dict[str, Any],
    graphml: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show the groups of coupled weights in MODEL."""
    for path in (graphml, html):
        if path is not None:
            check_replaceable(path)
    model = load_model(
        model_name,
        img_size=img_size,
        num_classes=num_classes,
        model_args=model_args,
        structure_only=True,
    )
    graph = depgraph.trace(model, example_inputs(model, img_size))
    result = describe(graph, model_name)
    if graphml is not None:
        graph.write_graphml(graphml)
    if html is not None:
        write_text(html, inspect_page(result))
    rows = [
        (g["name"], g["kind"], g["size"], len(g["members"]), g["frozen"] or "")
        for g in result["groups"]
    ]
    title = f"{model_name}: {graph.num_params:,} parameters, {graph.macs:,} MACs"
    emit(result, as_json, table(title, ["group", "kind", "units", "members", "frozen"], rows))


def describe(graph: DependencyGraph, name: str) -> dict[str, Any]:
    """The groups of a graph as plain data."""
    return {
        "model": name,
        "params": graph.num_params,
        "macs": graph.macs,
        "prunable": len(graph.prunable),
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "frozen": group.frozen,
                "members": [
                    {"parameter": m.parameter, "dim": m.dim, "place": m.place}
                    for m in group.members
                ],
                "buffers": [{"buffer": m.parameter, "dim": m.dim} for m in group.buffers],
            }
            for group in graph.groups
        ],
    }
