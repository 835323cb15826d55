"""Which models the engine prunes, exactly, and what is frozen: ``python -m benchmarks.coverage``.

For the smallest model of each timm family, and for models of transformers, torchvision and torch:
trace, groups, a random half of the units of every group, slice, forward in both modes, and the
difference from the original with the removed units switched off, and from itself in a batch of one
more, and how many modules needed a forward of their own. ``--peer`` adds Torch-Pruning.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph
from benchmarks.newest import HEADING as NEWEST
from benchmarks.pages import markdown_table, with_section
from benchmarks.peer import LIMIT_BYTES, LIMIT_S, torch_pruning_half
from benchmarks.sources import Source, other_sources, timm_family
from cli.output import table, write_text
from depgraph.rewriting.rewrite import original_class
from depgraph.tracing.calls import plain
from tests.interpret import masked_outputs
from tests.reference import randomise, relative_difference

COLUMNS = (
    *("library", "model", "prunable", "groups", "params kept", "rewritten", "difference", "s"),
    *("peer", "s"),
)


def row(source: Source, peer: bool) -> dict[str, Any]:
    """Prune one model.

    Parameters
    ----------
    source : Source
    peer : bool
        Whether to try Torch-Pruning too.

    Returns
    -------
    dict
        With ``"error"`` where something failed.
    """
    torch.manual_seed(0)
    model, inputs = source.build()
    result: dict[str, Any] = {"library": source.library, "model": source.name}
    if peer:
        result["peer"] = torch_pruning_half(source.build)
    try:
        return {**result, **_pruned(randomise(model.eval()), inputs)}
    except (depgraph.DepgraphError, RuntimeError) as error:
        return {**result, "error": f"{type(error).__name__}: {error}"}


def _pruned(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    graph = depgraph.trace(model, inputs)
    kept = {g.name: torch.randperm(g.size)[: max(1, g.size // 2)] for g in graph.prunable}
    plan = graph.plan(kept)
    small = plan.apply(model)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        got = _tensors(small(*inputs))
        expected = masked_outputs(graph, plan, model, inputs)
        differences = [
            *map(relative_difference, got, expected),
            _at_another_batch(small, inputs, got),
        ]
        small.train()(*inputs)
    return {
        "prunable": len(graph.prunable),
        "groups": len(graph.groups),
        "params_kept": sum(p.numel() for p in small.parameters()) / graph.num_params,
        "rewritten": sum(type(m) is not original_class(m) for m in small.modules()),
        "params_as_predicted": sum(p.numel() for p in small.parameters()) == plan.num_params,
        "difference": max(differences),
        "seconds": seconds,
        "frozen": Counter(g.frozen for g in graph.groups if g.frozen),
    }


def _at_another_batch(small: nn.Module, inputs: tuple[Tensor, ...], got: list[Tensor]) -> float:
    """How far the first samples come out from what they were, with one more of them."""
    more = _tensors(small(*(torch.cat([x, x[:1]]) for x in inputs)))
    pairs = zip(more, got, strict=True)
    return max(relative_difference(a[: len(b)], b) for a, b in pairs)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]


def _cells(r: dict[str, Any]) -> list[str]:
    peer = r.get("peer", {})
    tail = [peer.get("outcome", ""), f"{peer['seconds']:.2f}" if peer else ""]
    if "error" in r:
        return [r["library"], r["model"], "", "", "", "", r["error"][:60], "", *tail]
    return [
        r["library"],
        r["model"],
        str(r["prunable"]),
        str(r["groups"]),
        f"{r['params_kept']:.2f}",
        str(r.get("rewritten", "")),
        f"{r['difference']:.0e}",
        f"{r['seconds']:.2f}",
        *tail,
    ]


def _summary(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    exact = [r for r in rows if r.get("difference", 1.0) <= 1e-4]
    text = f"{len(exact)} of {len(rows)} models pruned and exact to 1e-4; "
    text += f"{sum(r.get('rewritten', 0) for r in rows)} modules got a rewritten forward"
    both = [r for r in exact if r.get("peer", {}).get("outcome") == "runs"]
    if both:
        mine, theirs = sum(r["seconds"] for r in both), sum(r["peer"]["seconds"] for r in both)
        runs = sum(r.get("peer", {}).get("outcome") == "runs" for r in rows)
        text += (
            f". Torch-Pruning's model runs for {runs}; over the {len(both)} that both prune: "
            f"{mine:.1f} s against {theirs:.1f} s, {mine / theirs:.2f}"
        )
    if len(both) > 1:  # one model alone may take a third of the peer's time
        slowest = max(both, key=lambda r: r["peer"]["seconds"])
        left = (mine - slowest["seconds"]) / (theirs - slowest["peer"]["seconds"])
        text += f"; without its slowest, {slowest['model']}, {left:.2f}"
    return f"{text}."


_PEER = (
    "The last two columns are Torch-Pruning's: whether its model runs, and the seconds it took to "
    f"build and prune; `no end` is more than {LIMIT_S} s or {LIMIT_BYTES >> 30} GiB."
)


def _markdown(rows: list[dict[str, Any]]) -> str:
    peers = any("peer" in r for r in rows)
    shown = len(COLUMNS) if peers else len(COLUMNS) - 2
    text = "# Models that the engine prunes\n\nMade by `python -m benchmarks.coverage"
    text += f" --peer`. {_summary(rows)} {_PEER}\n\n" if peers else f"`. {_summary(rows)}\n\n"
    text += markdown_table(COLUMNS[:shown], (_cells(r)[:shown] for r in rows))
    text += "\n## What is frozen, and why\n\n"
    for r in rows:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in r.get("frozen", {}).items())
        text += f"- **{r['model']}**: {reasons}\n"
    return text


def rows_of(
    todo: Iterable[str | Source], row: Callable[[Source], dict[str, Any]], kept: Path | None
) -> list[dict[str, Any]]:
    """A row for each timm family and other source, those in the file taken from there."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
    known = {(r["library"], r["model"]): r for r in map(json.loads, lines)}
    rows = []
    for item in todo:
        source = timm_family(item) if isinstance(item, str) else item
        if source is None:
            continue
        found = known.get((source.library, source.name))
        rows.append(found or row(source))
        if kept and not found:
            with kept.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(rows[-1])}\n")
    return rows


@click.command()
@click.option("--only", multiple=True, help="timm families; all by default.")
@click.option("--others/--no-others", default=True, help="Models of other libraries.")
@click.option("--peer/--no-peer", default=False, help="Torch-Pruning beside it.")
@click.option(
    "--rows",
    "kept",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Each row goes here at once; models that are in it already are not run again.",
)
@click.option("--json", "as_json", is_flag=True)
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False))
def main(
    only: tuple[str, ...],
    others: bool,
    peer: bool,
    kept: Path | None,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # the models' own, about how they are used here
    console = Console(stderr=True)
    todo = [*(only or timm.list_modules()), *(other_sources() if others else ())]
    models = track(todo, console=console, description="models")
    rows = rows_of(models, partial(row, peer=peer), kept)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        Console().print(table(_summary(rows), COLUMNS, list(map(_cells, rows))))
    if markdown is not None:
        newest = with_section(markdown, NEWEST, None)  # of another command, kept as it is
        write_text(markdown, _markdown(rows) + newest)


if __name__ == "__main__":
    main()
