"""Which models come back from a folder: ``python -m benchmarks.returns``.

The models of `benchmarks.coverage`, half of every group cut: each is saved, loaded as another
process would, and compared: every tensor, the mode, and the outputs. Where no source is known that
makes the model, it is loaded with an instance of it.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
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
from benchmarks.coverage import rows_of
from benchmarks.sources import Source, other_sources
from cli.output import table
from depgraph.storing import store
from depgraph.tracing.calls import plain
from tests.reference import randomise

COLUMNS = ("library", "model", "comes back", "why")


def row(source: Source) -> dict[str, Any]:
    """Prune one model, save and load it."""
    torch.manual_seed(0)
    found = {"library": source.library, "model": source.name}
    try:
        model, inputs = source.build()
        return {**found, **_returned(randomise(model.eval()), inputs, source)}
    except (depgraph.DepgraphError, RuntimeError, ValueError, TypeError) as error:
        return {**found, "outcome": "failed", "why": f"{type(error).__name__}: {error}"[:300]}


def _returned(model: nn.Module, inputs: tuple[Tensor, ...], source: Source) -> dict[str, Any]:
    graph = depgraph.trace(model, inputs)
    kept = {g.name: torch.randperm(g.size)[: max(1, g.size // 2)] for g in graph.prunable}
    small = graph.plan(kept).apply(model)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "model"
        depgraph.save(small, folder)
        store._remembered.clear()  # as in another process
        said = json.loads((folder / "plan.json").read_text())
        given = None if said["recipe"] else source.build()[0].eval()
        loaded = depgraph.load(folder, model=given)
    if not same(small, loaded, inputs):
        return {"outcome": "changed", "why": ""}
    return {"outcome": "alone" if given is None else "with model=", "why": said["why"]}


@torch.no_grad()
def same(small: nn.Module, loaded: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether two models hold the same tensors and compute the same, bit for bit."""
    first, second = small.state_dict(), loaded.state_dict()
    if first.keys() != second.keys() or small.training != loaded.training:
        return False
    if not all(torch.equal(tensor, second[name]) for name, tensor in first.items()):
        return False
    pairs = zip(_outputs(small, inputs), _outputs(loaded, inputs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [x for x in pytree.tree_leaves(plain(model(*inputs))) if isinstance(x, Tensor)]


@click.command()
@click.option("--only", multiple=True, help="timm families; all by default.")
@click.option("--others/--no-others", default=True, help="Models of other libraries.")
@click.option(
    "--rows",
    "kept",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Each row goes here at once; models that are in it already are not run again.",
)
def main(only: tuple[str, ...], others: bool, kept: Path | None) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # the models' own, about how they are used here
    todo = [*(only or timm.list_modules()), *(other_sources() if others else ())]
    rows = rows_of(track(todo, console=Console(stderr=True)), row, kept)
    counts = Counter(r["outcome"] for r in rows)
    title = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    cells = [(r["library"], r["model"], r["outcome"], r["why"][:100]) for r in rows]
    Console().print(table(title, COLUMNS, cells))
    if counts["changed"] or counts["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
