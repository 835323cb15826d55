"""The latency table of this device: read from a file, completed by measuring what a model needs.

The one place of the package that runs a clock, and so the only one that asks `domains` for it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depgraph import DependencyGraph, DepgraphError
from depgraph.files import replacing
from pruners.choosing.choices import AUTO
from pruners.speed.context import fit_factors, random_sizes
from pruners.speed.latency import LatencyModel, missing_grids, probes, with_times
from pruners.speed.table import FORMAT, Device, LatencyTable

WHOLE_MODELS = 8
"""Random plans that are cut and timed, to tell what ops take within a model."""

ROUNDS, SECONDS = 7, 0.3
"""Of timing each of them in turns with the dense model, at least."""


def measured_latency(
    graph: DependencyGraph,
    *,
    model: nn.Module | None = None,
    device: str = "cpu",
    threads: int | None = None,
    dtype: str = "float32",
    batch_size: int = 1,
    file: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LatencyModel:
    """The latency model of a traced model on a device.

    Parameters
    ----------
    graph : DependencyGraph
    model : nn.Module, optional
        That the graph is of. A few random plans of it are cut and timed as a whole then, unless the
        file has that already: single ops tell less than what they take within a model.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    threads : int, optional
        CPU threads; as torch is set by default.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    batch_size : int
        Samples of one forward.
    file : path, optional
        Where the table is; by default in the user's cache folder, by device, threads, dtype and
        version of torch. What the model needs and the file lacks is measured, which takes tens of
        seconds, and added to it.
    progress : bool
        A bar on standard error.

    Returns
    -------
    LatencyModel

    Raises
    ------
    DepgraphError
        For a device that is not there, and a file that is no table, or one of another device.
    """
    from domains.measuring import op_timing
    from domains.measuring.stand import device_name, find_device

    where = find_device(device)
    here = Device(
        str(where),
        device_name(where),
        threads or torch.get_num_threads(),
        dtype,
        str(torch.__version__),
    )
    path = _cache_file(here) if file is None else Path(file)
    table = _read(path, here)
    missing = missing_grids(graph, table, batch_size)
    if missing:
        jobs = [job for grid in missing for job in grid.jobs]
        jobs += [job for grid in missing for found in probes(grid).values() for job in found]
        times = op_timing.time_ops(
            jobs, device=device, threads=threads, dtype=dtype, progress=progress
        )
        table = table.with_grids(with_times(grid, times) for grid in missing)
        _write(path, table)
    latency = LatencyModel(graph, table, batch_size)
    if model is None or latency.is_fitted or not graph.prunable:
        return latency
    table = table.with_factors(latency.identity, _factors(latency, model, progress))
    _write(path, table)
    return LatencyModel(graph, table, batch_size)


def _factors(latency: LatencyModel, model: nn.Module, progress: bool) -> dict[str, float]:
    """What ops take within a model against alone, from a few of its plans."""
    from domains.measuring.timing import TimingSettings
    from domains.measuring.turns import time_in_turns
    from domains.running.progress import progress_bar

    graph, device = latency.graph, latency.table.device
    settings = TimingSettings(
        latency.batch_size,
        device.device,
        device.threads,
        seconds=SECONDS,
        min_rounds=ROUNDS,
        warmup_rounds=1,
        dtype=device.dtype,
    )
    draw = random.Random(WHOLE_MODELS)
    predicted, shares, dense = [latency.by_kind({})], [1.0], []
    with progress_bar(progress) as bar:
        for _ in bar.track(range(WHOLE_MODELS), description="timing whole models"):
            sizes = random_sizes(graph, draw)
            small = graph.plan({name: range(n) for name, n in sizes.items()}).apply(model)
            example, batch = graph.traced.example, graph.traced.batch
            times = time_in_turns([model, small], example, settings, batch)
            dense.append(np.median(times[:, 0]))
            shares.append(float(np.median(times[:, 1] / times[:, 0])))
            predicted.append(latency.by_kind(sizes))
    # shares within one round each, times the dense model's time: the load of the machine drifts
    return fit_factors(predicted, [share * float(np.median(dense)) * 1e3 for share in shares])


def with_latency(
    graph: DependencyGraph,
    choices: Mapping[str, Any],
    latency: LatencyModel | Mapping[str, Any] | None = None,
    **defaults: Any,
) -> dict[str, Any]:
    """Arguments of the allocator, with a latency model where they ask for what is fast.

    Parameters
    ----------
    graph : DependencyGraph
    choices : mapping
        Arguments of `pruners.choosing.allocation.allocator`.
    latency : LatencyModel or mapping, optional
        As given by the caller; a mapping holds arguments of `measured_latency`.
    **defaults
        Arguments of `measured_latency` that were not given.
    """
    asked = (
        "latency" in (choices.get("target") or {})
        or choices.get("per") == "latency"
        or choices.get("round_to") == AUTO
    )
    if not asked:
        return dict(choices)
    if not isinstance(latency, LatencyModel):
        latency = measured_latency(graph, **{**defaults, **(latency or {})})
    return {**choices, "latency": latency}


def _cache_file(device: Device) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depgraph-prune"
    identity = repr((FORMAT, sorted(asdict(device).items()))).encode()
    return folder / f"latency-{hashlib.sha256(identity).hexdigest()[:16]}.json"


def _read(path: Path, here: Device) -> LatencyTable:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return LatencyTable(here)
    except (OSError, UnicodeDecodeError) as error:
        raise DepgraphError(f"cannot read the latency table '{path}': {error}") from error
    try:
        table = LatencyTable.from_json(text)
    except DepgraphError as error:
        raise DepgraphError(f"'{path}': {error}") from error
    for name, value in asdict(here).items():
        known = getattr(table.device, name)
        if known != value:
            raise DepgraphError(
                f"the latency table '{path}' was measured with {name} {known}, not {value}; give "
                "another file, or measure where the model will run"
            )
    return table


def _write(path: Path, table: LatencyTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(table.to_json(), encoding="utf-8")
    except OSError as error:
        raise DepgraphError(
            f"cannot write the latency table '{path}': {error.strerror}; choose another place"
        ) from error
