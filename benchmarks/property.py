"""Random networks, random plans: does every sliced network compute the masked original?

``python -m benchmarks.property --networks 1000 --seed 0``. Ends with status 1 when a network fails;
each that does is made as small as it still fails, and printed as the code that builds it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from cli.output import table, write_text
from tests.networks import Network
from tests.trial import Failure, Outcome, shrink, try_network, why_it_fails


def failure(network: Network, seed: int) -> dict[str, Any]:
    """A failing trial, shrunk, as plain data."""
    small, plan_seed = shrink(network, seed)
    return {
        "seed": seed,
        "why": why_it_fails(small, plan_seed),
        "network": asdict(small),
        "plan_seed": plan_seed,
        "source": small.source(),
    }


def summary(outcomes: list[Outcome], failures: list[dict[str, Any]], seconds: float) -> dict:
    """The numbers of a run."""
    kinds = Counter(reason_kind(reason) for o in outcomes for reason in o.reasons)
    return {
        "networks": len(outcomes) + len(failures),
        "failures": len(failures),
        "groups_prunable": sum(o.prunable for o in outcomes),
        "groups_cut": sum(o.cut for o in outcomes),
        "largest_difference": max((o.difference for o in outcomes), default=0.0),
        "seconds": seconds,
        "frozen": dict(kinds.most_common()),
    }


def reason_kind(reason: str) -> str:
    """A frozen reason without the names in it."""
    reason = re.sub(r" \([^()]*, line \d+\)", "", reason)
    words = [word for word in reason.split() if not word.startswith("'")]
    return " ".join("n" if word.isdigit() else word for word in words).replace(" in ", " ")


@click.command()
@click.option("--networks", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first network.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--save", type=click.Path(path_type=Path, file_okay=False), help="Failures go here.")
def main(networks: int, seed: int, as_json: bool, save: Path | None) -> None:
    """Try that many networks and print what came of it."""
    torch.set_num_threads(1)
    start = time.monotonic()
    outcomes: list[Outcome] = []
    failures: list[dict[str, Any]] = []
    seeds = range(seed, seed + networks)
    for one in track(seeds, console=Console(stderr=True), description="networks"):
        try:
            outcomes.append(try_network(Network.random(one), one))
        except Failure:
            failures.append(failure(Network.random(one), one))
    numbers = summary(outcomes, failures, time.monotonic() - start)
    if save is not None:
        for found in failures:
            write_text(save / f"network_{found['seed']}.json", json.dumps(found, indent=1))
            write_text(save / f"network_{found['seed']}.py", found["source"])
    if as_json:
        click.echo(json.dumps({**numbers, "failing": failures}))
    else:
        _print(numbers, failures)
    sys.exit(1 if failures else 0)


def _print(numbers: dict[str, Any], failures: list[dict[str, Any]]) -> None:
    console = Console()
    for found in failures:
        console.print(f"seed {found['seed']}: {found['why']}", markup=False)
        console.print(found["source"], markup=False, highlight=False)
    frozen = numbers.pop("frozen")
    rows = [(name.replace("_", " "), _shown(value)) for name, value in numbers.items()]
    console.print(table("random networks", ("what", "number"), rows))
    console.print(
        table("frozen groups", ("why", "groups"), [(k, str(n)) for k, n in frozen.items()])
    )


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"


if __name__ == "__main__":
    main()
