"""How well transformers' newest models are pruned: ``python -m benchmarks.newest``.

Each tiny model runs in a fork of its own, with a limit of time: trace, half of the units of
every group removed, and the result compared with the original whose units are switched off, at two
batches, two sizes, two types and in both modes. ``--markdown docs/coverage.md`` puts the table into
that page; ``--rows FILE`` keeps each row, so that a later call goes on where this one stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import depgraph
from benchmarks.newest_sources import Newest, newest
from benchmarks.pages import markdown_table, with_section
from cli.output import table, write_text
from tests.agreement import Agreement, Finding, called, converted, flat, without_dropout
from tests.reference import randomise

COLUMNS = ("model", "outcome", "groups cut", "params kept", "difference", "batches", "sizes",
           "types", "modes", "why")  # fmt: skip
HEADING = "## Newest models of transformers"
LIMIT_S = 180
"""Time for one model."""

EXACT = 1e-4
"""Largest relative difference of what is called exact, in the widest type the model takes."""


def row(source: Newest) -> dict[str, Any]:
    """Prune one model and compare it with the original.

    Parameters
    ----------
    source : Newest

    Returns
    -------
    dict
        ``"outcome"`` is exact, partly frozen, refused, wrong or crashed.
    """
    torch.manual_seed(0)
    start = time.monotonic()
    model = without_dropout(source.build().eval())
    dtype = _widest(model, source)
    randomise(model)
    inputs = converted(dict(source.inputs(2, source.sizes[0])), dtype)
    model.to(dtype)
    try:
        graph = depgraph.trace(model, inputs)
        kept = {g.name: torch.randperm(g.size)[: max(1, g.size // 2)] for g in graph.prunable}
        plan = graph.plan(kept)
        agree = _with_signal(model, graph, plan, inputs)
    except depgraph.DepgraphError as error:
        return {"model": source.name, "outcome": "refused", "why": str(error)}
    except Exception as error:  # noqa: BLE001  an engine that crashes is a result, too
        text = f"{type(error).__name__}: {error}"
        return {"model": source.name, "outcome": "crashed", "why": text}
    agree.to(dtype)
    taken = _compare(agree, source, dtype)
    worst = min(agree.findings, key=lambda f: _ORDER.index(f.outcome), default=None)
    frozen = Counter(g.frozen for g in graph.groups if g.frozen)
    return {
        "model": source.name,
        "outcome": _outcome(worst, agree, plan.num_params / graph.num_params),
        "cut": len(graph.prunable),
        "groups": len(graph.groups),
        "params_kept": plan.num_params / graph.num_params,
        "difference": agree.difference,
        "checks": {name: _said(name, taken, agree.findings) for name in taken},
        "why": str(worst) if worst else _largest(frozen),
        "findings": [str(finding) for finding in agree.findings],
        "frozen": frozen,
        "seconds": time.monotonic() - start,
    }


_NO_WIDTHS = ("extent of a convolution", "dimension 1 of the model's input")
"""Reasons of dimensions that no one would prune."""

_ORDER = ("wrong", "crashed", "refused")

WHOLE = 0.6
"""Half of all units leaves about a third of the parameters; much more means frozen groups."""


def _outcome(worst: Finding | None, agree: Agreement, kept: float) -> str:
    if worst is not None:
        return worst.outcome if worst.outcome != "refused" else "refused at a call"
    if not agree.checks:
        return "not judged"
    if agree.difference > EXACT:
        return "wrong"
    return "exact" if kept <= WHOLE else "partly frozen"


def _with_signal(
    model: nn.Module, graph: depgraph.DependencyGraph, plan: depgraph.Plan, inputs: dict[str, Any]
) -> Agreement:
    """Both models with random weights whose results are not zero all over, as a ReLU's may be."""
    for seed in range(20):
        randomise(model, seed)
        agree = Agreement(model, plan.apply(model), graph, plan, "float32 topk")
        with torch.no_grad():
            results = flat(called(agree.reference, inputs))
        if all(bool(out.any()) for out in results if out.is_floating_point()):
            break
    return agree


def _widest(model: nn.Module, source: Newest) -> torch.dtype:
    """float64 where the original runs in it, else float32."""
    try:
        with torch.no_grad():
            called(model.double(), dict(source.inputs(2, source.sizes[0])))
    except RuntimeError:
        model.float()
        return torch.float32
    return torch.float64


def _compare(agree: Agreement, source: Newest, dtype: torch.dtype) -> dict[str, int]:
    """How many calls of each kind the original takes; what differs is noted."""

    def inputs(batch: int, size: int) -> dict[str, Any]:
        return converted(dict(source.inputs(batch, size)), dtype)

    first, *others = source.sizes
    taken = {"batches": sum(agree.run("batches", inputs(b, first)) for b in (2, 1, 3))}
    taken["sizes"] = sum(agree.run("sizes", inputs(2, size)) for size in others)
    before = agree.checks
    for other in (torch.float32, torch.bfloat16):
        agree.in_type(other, source.inputs(2, first))
    taken["types"] = agree.checks - before
    agree.train(True)
    taken["modes"] = int(agree.run("modes", inputs(2, first)))
    return taken


def _said(name: str, taken: dict[str, int], findings: list[Finding]) -> str:
    checks = {"types": ("float32", "bfloat16", "a copy")}.get(name, (name,))
    bad = [finding for finding in findings if finding.check in checks]
    if bad:
        return bad[0].outcome
    return f"exact, {taken[name]}" if taken[name] else "the original takes no other"


def _largest(frozen: Counter[str]) -> str:
    told = [(r, n) for r, n in frozen.most_common() if not r.startswith(_NO_WIDTHS)]
    return "; ".join(f"{reason} ({n})" for reason, n in told[:3])


def _in_a_process(source: Newest) -> dict[str, Any]:
    """The row, from a fork that has all of the imports and ends when its time is up."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(source, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT_S):
            found: dict[str, Any] = ours.recv()
            return found
        why = f"more than {LIMIT_S} s"
        return {"model": source.name, "outcome": "no end", "why": why}
    except EOFError:
        return {"model": source.name, "outcome": "no end", "why": "its process died"}
    finally:
        process.kill()
        process.join()


def _send_row(source: Newest, connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        found = row(source)
    except Exception as error:  # noqa: BLE001  the judge itself could not
        text = f"{type(error).__name__}: {error}"
        found = {"model": source.name, "outcome": "not judged", "why": text}
    connection.send(found)


def _cells(r: dict[str, Any]) -> list[str]:
    why = " ".join(r["why"].replace("|", "/").split())
    if "cut" not in r:
        return [r["model"], r["outcome"], *[""] * 7, why]
    return [
        r["model"],
        r["outcome"],
        f"{r['cut']} of {r['groups']}",
        f"{r['params_kept']:.2f}",
        f"{r['difference']:.0e}",
        *(r["checks"][name] for name in ("batches", "sizes", "types", "modes")),
        why,
    ]


def _summary(rows: list[dict[str, Any]]) -> str:
    counts = Counter(r["outcome"] for r in rows)
    return f"{len(rows)} models: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())


def _markdown(rows: list[dict[str, Any]]) -> str:
    text = (
        "Made by `python -m benchmarks.newest --markdown docs/coverage.md`, of tiny configurations "
        "with random weights, half of the units of every group removed: float64 where the original "
        "takes it, else float32; at batches 1, 2 and 3, at other image sizes or lengths, in "
        "float32 and bfloat16, in evaluation and training. *Partly frozen* keeps more than "
        f"{WHOLE:.0%} of the parameters; *why* is what most of the others are frozen "
        "for. "
    )
    return f"{text}{_summary(rows)}.\n\n{markdown_table(COLUMNS, map(_cells, rows))}"


@click.command()
@click.option("--only", multiple=True, help="Names of models; all by default.")
@click.option("--rows", "kept", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False))
def main(only: tuple[str, ...], kept: Path | None, markdown: Path | None) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # the models' own
    lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
    known = {r["model"]: r for r in map(json.loads, lines)}
    sources = [source for source in newest() if not only or source.name in only]
    rows = []
    for source in track(sources, console=Console(stderr=True), description="models"):
        rows.append(known.get(source.name) or _in_a_process(source))
        if kept and source.name not in known:
            with kept.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(rows[-1])}\n")
    short = [[*cells[:-1], cells[-1][:60]] for cells in map(_cells, rows)]
    Console().print(table(_summary(rows), COLUMNS, short))
    if markdown is not None:
        write_text(markdown, with_section(markdown, HEADING, _markdown(rows)))


if __name__ == "__main__":
    main()
