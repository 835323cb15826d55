"""Whether importance across source domains helps on the unseen one; pruned, not trained.

``python -m benchmarks.domain_aware DENSE --data ROOT --target DOMAIN``, where DENSE is a model
fine-tuned on the other domains (``dense`` of a run). Each metric's scores over all source images
together are compared with those of each domain, combined; everything else is the same, and the
target is looked at once, for its accuracy.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor, nn

import depgraph
import domains
import pruners
from cli.options.across import across_domains
from cli.options.shared import data_option, json_option, seed_option, split_option, target_option
from cli.output import environment, percent, table
from cli.running.models import example_inputs
from cli.running.saved import load_saved
from domains import Split
from pruners.choosing.allocation import allocate
from pruners.choosing.choices import AUTO
from pruners.choosing.domain_aware import DomainAware, combine_scores, foretelling
from pruners.metrics.scoring import CALIBRATION_SAMPLES, take_samples
from pruners.pruning import with_defaults
from pruners.refitting.basis import align_head_dims
from pruners.refitting.compensation import compensate

TOGETHER = "together"
"""One score over the images of all domains: what `prune` does when nothing is said."""


def study(dense: nn.Module, split: Split, metric: str, share: float, seed: int) -> Iterator[dict]:
    """A row for each way to combine, of one metric.

    Parameters
    ----------
    dense : nn.Module
        Fine-tuned on the sources of the split.
    split : Split
    metric : str
    share : float
        Of the MACs that is kept.
    seed : int
        Of the images that are scored and compensated with.

    Yields
    ------
    dict
        Accuracy by domain: the validation part of each source, and all of the target.
    """
    scorer = pruners.make_metric(metric, seed=seed)
    graph = depgraph.trace(dense, example_inputs(dense))
    batches = domains.batches(dense, split, batch_size=16, seed=seed)
    calibration = take_samples(batches, CALIBRATION_SAMPLES, torch.device("cpu"), exact=False)
    model = copy.deepcopy(dense)
    align_head_dims(model, graph, calibration, seed)
    aware = across_domains(scorer, "mean", model, split, seed=seed)
    assert isinstance(aware, DomainAware)
    by_domain = aware.by_domain(model, graph)
    ways: dict[str, dict[str, Tensor]] = {TOGETHER: pruners.score(model, graph, scorer, batches)}
    ways |= {how: combine_scores(by_domain, how) for how in ("mean", "variance", "min")}
    chosen = foretelling(by_domain)
    choices = with_defaults(scorer, target={"macs": share}, kinds=AUTO)
    for how, scores in ways.items():
        plan = graph.plan(allocate(graph, scores, **choices))
        small = plan.apply(model)
        compensate(model, small, plan, calibration)
        yield {
            "metric": metric,
            "combine": how,
            "leave_one_out": how == chosen,  # what that estimate, on the sources, would take
            "seed": seed,
            "target_domain": split.target,
            "macs_kept": plan.macs / graph.macs,
            "accuracy": domains.evaluate(small, split),
        }


@click.command()
@click.argument("dense", type=click.Path(path_type=Path, exists=True, file_okay=False))
@data_option
@target_option
@split_option
@seed_option
@click.option(
    "--sample-seed",
    "sample_seeds",
    multiple=True,
    type=int,
    default=(0,),
    show_default=True,
    help="Which images are scored and compensated with; may be given again.",
)
@click.option("--metric", "metrics", multiple=True, default=("obs", "fisher", "taylor"))
@click.option("--target-macs", default=0.36, show_default=True, help="Share of the MACs kept.")
@json_option
def main(
    dense: Path,
    data: Path,
    target: str,
    split_by: Any,
    seed: int,
    sample_seeds: tuple[int, ...],
    metrics: tuple[str, ...],
    target_macs: float,
    as_json: bool,
) -> None:
    """Print the table, or one JSON object for each row as it is done.

    --seed is that of the split, and has to be the one that DENSE was fine-tuned with.
    """
    found = domains.load_domains(data, progress=not as_json)
    split = domains.leave_one_out(found, target, seed=seed, split_by=split_by)
    model = load_saved(dense).eval()
    rows = []
    for metric, sample_seed in itertools.product(metrics, sample_seeds):
        for row in study(model, split, metric, target_macs, sample_seed):
            rows.append(row)
            if as_json:
                click.echo(json.dumps({**row, **environment()}))
    if not as_json:
        columns = ["metric", "domains", "seed", "MACs kept", "sources", f"{target} (unseen)"]
        title = "pruned and compensated, not trained"
        Console().print(table(title, columns, [_cells(row, target) for row in rows]))


def _cells(row: dict[str, Any], target: str) -> list[str]:
    sources = [share for name, share in row["accuracy"].items() if name != target]
    return [
        row["metric"],
        row["combine"] + (" (leave-one-out)" if row["leave_one_out"] else ""),
        str(row["seed"]),
        f"{row['macs_kept']:.3f}",
        percent(sum(sources) / len(sources)),
        percent(row["accuracy"][target]),
    ]


if __name__ == "__main__":
    main()
