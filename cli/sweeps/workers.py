"""Who does the work of a sweep: this process, or Ray's workers here or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from cli.options.failures import sentence
from cli.sweeps.grid import Cell
from cli.sweeps.work import Outcome, Place, dense_directory, fail, work_on_dense, work_on_run
from depgraph import DepgraphError

Report = Callable[[Outcome], None]


@dataclass(frozen=True)
class Task:
    """A run and the name of the dense model that it starts from."""

    cell: Cell
    dense: str


def in_turn(place: Place, tasks: Sequence[Task], report: Report) -> None:
    """Do all work in this process, each dense model right before the first run that needs it."""
    dense: dict[str, Outcome] = {}
    for task in tasks:
        if task.dense not in dense:
            dense[task.dense] = work_on_dense(place, task.dense, task.cell)
            report(dense[task.dense])
        report(work_on_run(place, task.dense, task.cell, dense[task.dense]))


def on_ray(
    place: Place,
    tasks: Sequence[Task],
    report: Report,
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Do all work on Ray; a run waits for its dense model alone.

    Parameters
    ----------
    place : Place
        `workers` of it are started here where there is no address.
    tasks : sequence of Task
    report : callable
        Gets every outcome as it comes.
    address : str, optional
        Of a cluster whose machines share the directories; ``"auto"``: the one this machine is in.
    resources : mapping of str to float, optional
        Of one run: ``num_cpus``, ``num_gpus``, ...

    Raises
    ------
    DepgraphError
        Where Ray is not installed, or has no such cluster.
    """
    ray = _ray()
    _connect(ray, place, address)
    try:
        options = {"num_cpus": 1, "max_retries": 1, **(resources or {})}
        dense_work = ray.remote(work_on_dense).options(**options)
        run_work = ray.remote(work_on_run).options(**options)
        first = {task.dense: task.cell for task in reversed(tasks)}
        keys = dict.fromkeys(task.dense for task in tasks)
        dense = {key: dense_work.remote(place, key, first[key]) for key in keys}
        waiting = {ref: dense_directory(place, key) for key, ref in dense.items()}
        for task in tasks:
            ref = run_work.remote(place, task.dense, task.cell, dense[task.dense])
            waiting[ref] = place.out / task.cell.name
        while waiting:
            (ref, *_), _ = ray.wait(list(waiting), num_returns=1)
            directory = waiting.pop(ref)
            try:
                report(ray.get(ref))
            except ray.exceptions.RayError as error:  # its process died, for want of memory or so
                report(fail(directory, f"the worker died: {sentence(error)}"))
    finally:
        ray.shutdown()


def _ray() -> Any:
    if find_spec("ray") is None:
        raise DepgraphError(
            "several workers need Ray; pip install 'depgraph-prune[cluster]', or leave --workers "
            "and --ray out"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray will do anyway
    import ray

    return ray


def _connect(ray: Any, place: Place, address: str | None) -> None:
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=place.workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DepgraphError(f"Ray has no cluster at '{address}': {sentence(error)}") from error
