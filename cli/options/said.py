"""From options to arguments: what several options say together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pruners.choosing.choices import AUTO

BEST_METRIC = "obs"
"""What `run` and `prune` score with when nothing is said: the best the project knows."""


def metric_and_kinds(metric: str | None, kinds: tuple[str, ...]) -> tuple[str, Any]:
    """What to score with and what to prune: the best the project knows where nothing is said."""
    if metric is None:
        return BEST_METRIC, kinds or AUTO
    return metric, kinds or None


def algorithm_said(name: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings of a training, from the options that may say them."""
    if name is None and arguments:
        raise click.UsageError("--algorithm-arg needs --algorithm")
    return {} if name is None else {"algorithm": name, "algorithm_args": arguments}


def compensation(wanted: bool, by: str) -> Any:
    """Argument ``compensate`` of `pruners.prune`."""
    return by if wanted and by in ("readers", "means") else wanted


BUDGETS = ("ratio", "target_macs", "target_params", "target_latency")
"""Options of which one says how much goes."""


def clock(
    table: Path | None, batch_size: int, device: str, progress: bool, dtype: str = "float32"
) -> dict[str, Any]:
    """Arguments of `pruners.measured_latency`, from the options that say them."""
    return {
        "file": table,
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }


def budget(
    ratio: float | None,
    target_macs: float | None,
    target_params: float | None,
    target_latency: float | None,
) -> dict[str, Any]:
    """Arguments ``ratio`` or ``target`` of `pruners.prune`, from the options that may say them."""
    given = {
        "ratio": ratio,
        "macs": target_macs,
        "params": target_params,
        "latency": target_latency,
    }
    said = {name: share for name, share in given.items() if share is not None}
    if len(said) > 1:
        raise click.UsageError(
            "give one of --ratio, --target-macs, --target-params and --target-latency"
        )
    if "ratio" in said or not said:
        return {"ratio": said.get("ratio", 0.5)}
    return {"target": said}
