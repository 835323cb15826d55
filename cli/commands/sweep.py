"""``sweep``: a grid of runs from one file; killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

import domains
from cli.options.shared import json_option
from cli.output import check_apart, command_line, emit, note, table
from cli.running.made import force_option
from cli.running.run_stages import dense_identity
from cli.sweeps.grid import Grid, read_grid
from cli.sweeps.work import (
    ERROR,
    Outcome,
    Place,
    check_directory,
    check_model,
    dense_directory,
    job_of,
    status,
    thinned,
)
from cli.sweeps.workers import Task, in_turn, on_ray
from cli.verbosity import progress
from domains import DomainData


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", help="In place of the file's: a folder, or digits.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory  [the file's out, else sweeps/<name of the file>].",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes at once, one thread each; needs Ray."
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Run on this Ray cluster, or auto; its machines share --out.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@force_option
@click.option("--dry-run", is_flag=True, help="Show the runs, do none.")
@json_option
def sweep(
    file: Path,
    data: str | None,
    out: Path | None,
    workers: int | None,
    address: str | None,
    retry_failed: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do all runs that FILE asks for, each as `run` would; what is done is not done again.

    FILE is TOML: data, models, metrics (or "all"), budgets (ratios, target_macs, target_params),
    targets, seeds, controls, and any option of `run` by its name, as one value or a list of them.
    Dense models are trained once and shared. A run that fails is kept with its error, and does not
    stop the others.
    """
    began = time.perf_counter()
    if workers is not None and address is not None:
        raise click.UsageError("give --workers for this machine, or --ray for a cluster, not both")
    grid = read_grid(file)
    if data == "":
        raise click.UsageError("--data is empty; say which")
    grid = grid if data is None else replace(grid, data=data)
    place = Place(
        out=(out or Path(grid.out or f"sweeps/{file.stem}")).resolve(),
        data=Path(grid.data).resolve(),
        digits=grid.data == "digits",
        keep_models=grid.keep_models,
        threads=_threads(grid, workers, address),
        workers=workers or 1,
        command=command_line(),
    )
    if not place.digits:
        check_apart(place.out, place.data)
    with tempfile.TemporaryDirectory() as scratch:
        place, found = _data(place, grid, Path(scratch) if dry_run else None, progress(as_json))
        tasks = _tasks(place, grid, found)
    if dry_run:
        _show_plan(place, tasks, as_json)
        return
    for directory in _directories(place, tasks):
        check_directory(directory, force)
    if retry_failed:
        _forget_failures(place, tasks)
    outcomes = _work(place, grid, tasks, address, progress(as_json))
    seconds = time.perf_counter() - began
    if not _show_outcomes(place, tasks, outcomes, seconds, as_json):
        raise click.exceptions.Exit(1)


def _threads(grid: Grid, workers: int | None, address: str | None) -> int | None:
    if workers is not None or address is not None:
        return max(1, int(grid.ray.get("num_cpus", 1)))
    # Ops as small as those on the digits only wait for each other on more threads.
    return 1 if grid.data == "digits" else None


def _data(
    place: Place, grid: Grid, scratch: Path | None, progress: bool
) -> tuple[Place, DomainData]:
    """The verified data, the digits written where the sweep is; a dry run writes them elsewhere."""
    if place.digits:
        per_class = grid.digits_per_class if scratch is None else 2
        root = (scratch or place.out) / "digits"
        place = replace(
            place, data=domains.write_digits(root, per_class=per_class, progress=progress)
        )
    verify = scratch is None
    return place, domains.load_domains(place.data, verify=verify, progress=progress and verify)


def _tasks(place: Place, grid: Grid, found: DomainData) -> list[Task]:
    """All runs with their dense models; a bad option is found here, before any work."""
    few = thinned(found)
    tasks: list[Task] = []
    for cell in grid.cells(found.domains):
        job = job_of(place, cell, few)
        identity = dense_identity(job.split, job.settings)
        del identity["train"]  # how many images there are is no choice
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        target, seed = cell.options["target"], cell.options["seed"]
        key = f"{Path(cell.label).name}-{target}-seed{seed}-{digest}"
        if not any(task.dense == key for task in tasks):
            check_model(place, cell)
        tasks.append(Task(cell, key))
    return tasks


def _directories(place: Place, tasks: list[Task]) -> list[Path]:
    dense = dict.fromkeys(task.dense for task in tasks)
    runs = [place.out / task.cell.name for task in tasks]
    return [*(dense_directory(place, key) for key in dense), *runs]


def _forget_failures(place: Place, tasks: list[Task]) -> None:
    for directory in _directories(place, tasks):
        (directory / ERROR).unlink(missing_ok=True)


def _work(
    place: Place, grid: Grid, tasks: list[Task], address: str | None, progress: bool
) -> dict[str, Outcome]:
    """What came of each run, by its name, those of earlier calls too."""
    outcomes = {task.cell.name: status(place.out / task.cell.name) for task in tasks}
    finished = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
    open_tasks = [task for task in tasks if task.cell.name not in finished]
    if finished and progress:
        note(f"{len(finished)} of {len(tasks)} runs are finished already")
    dense = len({task.dense for task in open_tasks})
    with domains.progress_bar(progress and bool(open_tasks)) as bar:
        ticks = bar.add_task("sweep", total=len(open_tasks) + dense)

        def report(outcome: Outcome) -> None:
            finished[outcome.name] = outcome
            _tick(bar, ticks, outcome)

        if not open_tasks:
            pass
        elif address is None and place.workers == 1:
            in_turn(place, open_tasks, report)
        else:
            on_ray(place, open_tasks, report, address=address, resources=grid.ray)
    return {task.cell.name: finished[task.cell.name] for task in tasks}


def _tick(bar: Progress, ticks: Any, outcome: Outcome) -> None:
    bar.update(ticks, advance=1)
    if outcome.error is not None:
        bar.console.print(f"failed: {outcome.name}: {outcome.error}", markup=False)


def _show_plan(place: Place, tasks: list[Task], as_json: bool) -> None:
    rows = []
    for task in tasks:
        outcome = status(place.out / task.cell.name)
        state = "to do" if outcome is None else "failed" if outcome.error else "done"
        rows.append({"name": task.cell.name, "dense": task.dense, "state": state})
    dense = len({task.dense for task in tasks})
    plan = {"out": str(place.out), "dense_models": dense, "runs": rows}
    title = f"{len(rows)} runs from {dense} dense models, in {place.out}"
    emit(plan, as_json, table(title, ["run", "state"], [(r["name"], r["state"]) for r in rows]))


def _show_outcomes(
    place: Place, tasks: list[Task], outcomes: dict[str, Outcome], seconds: float, as_json: bool
) -> bool:
    failed = [outcome for outcome in outcomes.values() if outcome.error is not None]
    result = {
        "out": str(place.out),
        "runs": len(tasks),
        "done": len(tasks) - len(failed),
        "dense_models": len({task.dense for task in tasks}),
        "failed": [{"name": outcome.name, "error": outcome.error} for outcome in failed],
        "workers": place.workers,
        "seconds": seconds,
    }
    rows = [(outcome.name, outcome.error) for outcome in failed]
    tables = [table(f"{len(failed)} failed", ["run", "why"], rows)] if failed else []
    emit(result, as_json, *tables)
    if not as_json:
        click.echo(f"{result['done']} of {len(tasks)} runs are done, in {place.out}")
        click.echo(f"tables and plots: depgraph-prune report {place.out}")
    return not failed
