"""Random networks, random plans: is every sliced network the masked original, however it is called?

``python -m benchmarks.property --number 1000 --seed-from 0``. Prints how many networks came out
exact, refused, wrong or crashed, by kind and with their seeds; ends with status 1 when one is wrong
or crashed. ``--rows FILE`` keeps each outcome, so that a later call goes on where this one stopped;
``--shrink`` makes the first of each kind as small as it still fails, and prints its code.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track

from cli.output import table
from tests.networks import Network
from tests.trial import SEVERITY, examine, kind_of, shrink

OUTCOMES = ("exact", *reversed(SEVERITY))


def tried(seed: int) -> dict[str, Any]:
    """What came of the network of a seed under the plan of the same seed, as plain data."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    outcome = examine(Network.random(seed), seed)
    worst = outcome.worst
    return {
        "seed": seed,
        "outcome": "exact" if worst is None else worst.outcome,
        "kind": None if worst is None else kind_of(worst),
        "text": None if worst is None else str(worst),
        "findings": [str(finding) for finding in outcome.findings],
        "prunable": outcome.prunable,
        "cut": outcome.cut,
        "checks": outcome.checks,
        "difference": outcome.difference,
        "frozen": Counter(map(reason_kind, outcome.reasons)),
        "seconds": time.monotonic() - start,
    }


def reason_kind(reason: str) -> str:
    """A frozen reason without the names in it."""
    reason = re.sub(r" \([^()]*, line \d+\)", "", reason)
    words = [word for word in reason.split() if not word.startswith("'")]
    return " ".join("n" if word.isdigit() else word for word in words).replace(" in ", " ")


def _rows(seeds: Iterable[int], jobs: int, kept: Path | None) -> Iterator[dict[str, Any]]:
    lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
    known = {row["seed"]: row for row in map(json.loads, lines)}
    todo = []
    for seed in seeds:
        if seed in known:
            yield known[seed]
        else:
            todo.append(seed)
    for row in _parallel(todo, jobs) if jobs > 1 else map(tried, todo):
        if kept:
            with kept.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")
        yield row


def _parallel(seeds: list[int], jobs: int) -> Iterator[dict[str, Any]]:
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(tried, seeds)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a run."""
    frozen: Counter[str] = Counter()
    for row in rows:
        frozen.update(row["frozen"])
    outcomes = Counter(row["outcome"] for row in rows)
    return {
        "networks": len(rows),
        **{outcome: outcomes[outcome] for outcome in OUTCOMES},
        "groups_prunable": sum(row["prunable"] for row in rows),
        "groups_cut": sum(row["cut"] for row in rows),
        "calls_compared": sum(row["checks"] for row in rows),
        "largest_difference_of_exact": max(
            (row["difference"] for row in rows if row["outcome"] == "exact"), default=0.0
        ),
        "seconds": sum(row["seconds"] for row in rows),
        "frozen": dict(frozen.most_common()),
    }


def by_kind(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, list[int]]]:
    """Outcome, kind and seeds of what is not exact: the worst outcome first, then by number."""
    seeds = defaultdict(list)
    for row in rows:
        if row["outcome"] != "exact":
            seeds[row["outcome"], row["kind"]].append(row["seed"])
    order = sorted(seeds.items(), key=lambda item: (SEVERITY.index(item[0][0]), -len(item[1])))
    return [(outcome, kind, found) for (outcome, kind), found in order]


@click.command()
@click.option("--number", default=1000, show_default=True, help="Networks.")
@click.option("--seed-from", default=0, show_default=True, help="Seed of the first network.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--rows", "kept", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--shrink/--no-shrink", "smaller", default=False, help="Shrink one of each kind.")
@click.option("--json", "as_json", is_flag=True)
def main(
    number: int, seed_from: int, jobs: int, kept: Path | None, smaller: bool, as_json: bool
) -> None:
    """Try that many networks and print what came of it."""
    seeds = range(seed_from, seed_from + number)
    progress = track(
        _rows(seeds, jobs, kept), total=number, console=Console(stderr=True), description="networks"
    )
    rows = sorted(progress, key=lambda row: int(row["seed"]))
    numbers, kinds = summary(rows), by_kind(rows)
    if as_json:
        click.echo(json.dumps({**numbers, "kinds": kinds}))
    else:
        _print(numbers, kinds)
    for _, kind, found in kinds if smaller else ():
        _print_smaller(kind, found[0])
    sys.exit(1 if numbers["wrong"] or numbers["crashed"] else 0)


def _print(numbers: dict[str, Any], kinds: list[tuple[str, str, list[int]]]) -> None:
    console = Console()
    frozen = numbers.pop("frozen")
    cells = [(name.replace("_", " "), _shown(value)) for name, value in numbers.items()]
    console.print(table("random networks", ("what", "number"), cells))
    console.print(
        table("frozen groups", ("why", "groups"), [(k, str(n)) for k, n in frozen.items()])
    )
    rows = [
        (outcome, kind, str(len(found)), f"{len(found) / numbers['networks']:.1%}", _some(found))
        for outcome, kind, found in kinds
    ]
    heading = ("outcome", "kind", "networks", "share", "seeds")
    console.print(table("not exact, by kind", heading, rows))


def _some(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds[:12])) + (", ..." if len(seeds) > 12 else "")


def _print_smaller(kind: str, seed: int) -> None:
    warnings.simplefilter("ignore")
    network, plan_seed = shrink(Network.random(seed), seed)
    console = Console()
    text = f"\n{kind}\nseed {seed}, plan {plan_seed}: {examine(network, plan_seed).worst}\n"
    console.print(f"{text}{network}\n{network.source()}", markup=False, highlight=False)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"


if __name__ == "__main__":
    main()
