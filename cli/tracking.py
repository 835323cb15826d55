"""Epochs of a training logged to TensorBoard, Weights & Biases or MLflow, through accelerate.

One tracked run for each training, dense and recovery, with the same scalars by epoch, so that any
of these tools shows the two as two curves in one chart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from accelerate import tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from domains import EpochRow

TRACKERS = ("tensorboard", "wandb", "mlflow")
PROJECT = "depgraph-prune"

_INSTALL = {"tensorboard": "'depgraph-prune[track]'", "wandb": "wandb", "mlflow": "mlflow"}


def available_tracker(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The tracker's name, once it is known to be installed: before any work."""
    if value is not None and value not in map(str, tracking.get_available_trackers()):
        raise click.BadParameter(
            f"'{value}' is not installed; install it with: pip install {_INSTALL[value]}",
            ctx,
            param,
        )
    return value


@contextmanager
def tracked(
    tracker: str | None, out: Path, stage: str, config: dict[str, Any]
) -> Iterator[Callable[[EpochRow], None] | None]:
    """Give what `domains.finetune` is to call after each epoch; None where nothing is tracked.

    Parameters
    ----------
    tracker : str or None
        One of `TRACKERS`.
    out : Path
        Of the run; files go to ``tracking/`` in it, unless the tool's own environment variables
        (``WANDB_DIR``, ``MLFLOW_TRACKING_URI``) say otherwise.
    stage : str
        ``dense`` or ``recovery``.
    config : dict
        What the training was made with; logged once, with its first epoch.
    """
    if tracker is None:
        yield None
        return
    started: list[GeneralTracker] = []

    def on_epoch(row: EpochRow) -> None:
        if not started:  # after training has set up accelerate's state, and only if it trains
            started.append(_start(tracker, out, stage, config))
        started[0].log(scalars(row), step=row["epoch"])

    try:
        yield on_epoch
    finally:
        for one in started:
            one.finish()


def scalars(row: EpochRow) -> dict[str, float]:
    """The numbers of an epoch, by the names that they are logged under.

    Examples
    --------
    >>> row = {"epoch": 1, "lr": 0.1, "train_loss": 2.0, "val_loss": 1.0, "val_accuracy": 0.5,
    ...        "val_accuracies": {"art": 0.5}, "seconds": 3.0}
    >>> scalars(row)["val_accuracy/art"]
    0.5
    """
    numbers = {
        "lr": row["lr"],
        "train_loss": row["train_loss"],
        "val_loss": row["val_loss"],
        "val_accuracy": row["val_accuracy"],
        "seconds": row["seconds"],
    }
    return numbers | {f"val_accuracy/{name}": x for name, x in row["val_accuracies"].items()}


def _start(tracker: str, out: Path, stage: str, config: dict[str, Any]) -> GeneralTracker:
    folder = (out / "tracking").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{out.absolute().name}-{stage}"
    make = LOGGER_TYPE_TO_CLASS[tracker]
    if tracker == "tensorboard":
        made = make(stage, logging_dir=str(folder))
    elif tracker == "wandb":
        made = make(PROJECT, name=name, dir=os.environ.get("WANDB_DIR", str(folder)))
    else:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        made = make(PROJECT, logging_dir=(folder / "mlflow").as_uri(), run_name=name)
    made.start()
    made.store_init_configuration(_flat(config))
    return made


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of numbers and text, which is all that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{key}"] = value if simple else str(value)
    return flat
