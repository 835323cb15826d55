"""``inspect``: what can be pruned, and what cannot and why; weights are loaded for scores only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import Tensor, nn

import depgraph
import domains
import pruners
from cli.options.params import Share
from cli.options.shared import json_option, model_options, seed_option
from cli.output import MACS_NOTE, emit, table, write_text
from cli.running.made import check_files, force_option
from cli.running.models import check_classes, example_inputs, load_model
from cli.showing.explore import explore
from cli.showing.html import inspect_page
from depgraph import DependencyGraph, DepgraphError
from pruners import METRICS
from pruners.choosing.allocation import allocate
from pruners.metrics.scoring import score
from pruners.registry import Metric


@click.command(epilog=MACS_NOTE)
@model_options
@click.option("--graphml", type=click.Path(path_type=Path, dir_okay=False), help="Graph file.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Page of groups.")
@click.option("--metric", help=f"Score the units: one of {', '.join(METRICS)}.")
@click.option("--ratio", type=Share(), help="Show what pruning this share would remove  [l2].")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Show what a plan.json removes.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of images to score with.",
)
@force_option
@seed_option
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
    metric: str | None,
    ratio: float | None,
    plan_file: Path | None,
    data: Path | None,
    force: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Show the groups of coupled weights in MODEL."""
    for path, option in ((graphml, "--graphml"), (html, "--html")):
        if path is not None:
            check_files([path], force, option)
    if ratio is not None and plan_file is not None:
        raise click.UsageError("give one of --ratio and --plan")
    metric = metric or ("l2" if ratio is not None else None)
    scorer = None if metric is None else pruners.make_metric(metric, seed=seed)
    if scorer is not None and scorer.needs_data and data is None:
        raise DepgraphError(f"metric '{metric}' looks at images; say where with --data")
    model = load_model(
        model_name,
        pretrained=pretrained,
        weights=weights,
        img_size=img_size,
        num_classes=num_classes,
        model_args=model_args,
        seed=seed,
        structure_only=scorer is None,
    )
    graph = depgraph.trace(model, example_inputs(model, img_size))
    scores = None if scorer is None else _scores(model, graph, scorer, data, seed)
    plan = None
    if plan_file is not None:
        plan = _plan(graph, plan_file)
    elif scores is not None and ratio is not None:
        plan = graph.plan(allocate(graph, scores, ratio=ratio))
    result = describe(graph, model_name)
    if metric is not None:
        result |= {"metric": metric, "seed": seed}
    if plan is not None:
        result["pruned"] = {"params": plan.num_params, "macs": plan.macs}
        for group in result["groups"]:
            kept = plan.kept_units.get(group["name"], range(group["size"]))
            group["kept"] = len(kept)
    if graphml is not None:
        graph.write_graphml(graphml)
    if html is not None:
        kept_units = None if plan is None else plan.kept_units
        write_text(html, inspect_page(result, explore(graph, scores, kept_units)))
    rows = [
        (
            *(g["name"], g["kind"], g["size"]),
            *([] if plan is None else [g["kept"]]),
            *(len(g["members"]), g["frozen"] or ""),
        )
        for g in result["groups"]
    ]
    title = f"{model_name}: {graph.num_params:,} parameters, {graph.macs:,} MACs"
    columns = ["group", "kind", "units", *(["kept"] if plan else []), "members", "frozen"]
    emit(result, as_json, table(title, columns, rows, MACS_NOTE))


def _scores(
    model: nn.Module, graph: DependencyGraph, scorer: Metric, data: Path | None, seed: int
) -> dict[str, Tensor]:
    batches = None
    if scorer.needs_data and data is not None:
        found = domains.load_domains(data)
        check_classes(model, len(found.classes), data)
        batches = domains.batches(model, found, batch_size=16, seed=seed)
    return score(model, graph, scorer, batches)


def _plan(graph: DependencyGraph, path: Path) -> depgraph.Plan:
    """A plan from a file, for this graph."""
    try:
        plan = depgraph.Plan.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DepgraphError(f"'{path}' is no plan: it is no text") from error
    graph.check_plan(plan)
    return graph.plan(plan.kept_units)


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
