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

from cli.output import write_text
from depgraph import DepgraphError
from domains import EpochRow
from domains.running.processes import is_main

TRACKERS = ("tensorboard", "wandb", "mlflow")
PROJECT = "depgraph-prune"

_URI = "MLFLOW_TRACKING_URI"
_WAY = {
    "wandb": "see to it and go on with --resume, or log to files alone with WANDB_MODE=offline",
    "mlflow": f"see to it and go on with --resume, or log to a file without {_URI}",
}
_EXTRA = {"tensorboard": "track", "wandb": "wandb", "mlflow": "mlflow"}


def available_tracker(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The tracker's name, once it is known to be installed and to take runs: before any work."""
    if value is None:
        return None
    if value not in map(str, tracking.get_available_trackers()):
        way = f"pip install 'depgraph-prune[{_EXTRA[value]}]'"
        raise click.BadParameter(f"'{value}' is not installed; install it with: {way}", ctx, param)
    if is_main():
        with _in_one_sentence(value):
            _reach(value)
    return value


def _reach(tracker: str) -> None:
    """Log in to Weights & Biases (it asks, on a terminal); ask a server of MLflow for anything."""
    if tracker == "wandb":
        import wandb

        wandb.login()
    elif tracker == "mlflow" and _URI in os.environ:
        import mlflow

        mlflow.search_experiments(max_results=1)


@contextmanager
def _in_one_sentence(tracker: str) -> Iterator[None]:
    """Turn the errors of the tools, which derive from no error of Python's, into ours."""
    kinds: tuple[type[Exception], ...] = ()
    if tracker == "wandb":
        import wandb

        kinds = (wandb.Error,)
    elif tracker == "mlflow":
        import mlflow

        kinds = (mlflow.MlflowException,)
    try:
        yield
    except kinds as error:
        text = str(error).partition("\n")[0]
        raise DepgraphError(f"{tracker} takes no runs ({text}); {_WAY[tracker]}") from error


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
        with _in_one_sentence(tracker):
            if not started:  # after training has set up accelerate's state, and only if it trains
                started.append(_start(tracker, out, stage, config, resumed=row["epoch"] > 1))
            started[0].log(scalars(row), step=row["epoch"])

    uri = os.environ.get(_URI)
    try:
        yield on_epoch
    finally:
        with _in_one_sentence(tracker):
            for one in started:
                one.finish()
        if uri is None:  # the next run has a store of its own
            os.environ.pop(_URI, None)


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


def _start(
    tracker: str, out: Path, stage: str, config: dict[str, Any], resumed: bool
) -> GeneralTracker:
    """The tracked run, with its settings; that of the same training where it is resumed."""
    folder = (out / "tracking").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{out.absolute().name}-{stage}"
    make = LOGGER_TYPE_TO_CLASS[tracker]
    if tracker == "tensorboard":
        made = make(stage, logging_dir=str(folder))
        made.start()
        made.store_init_configuration(_flat(config))
        return made
    known = folder / f"{stage}.{tracker}"  # the name that the tool gave the run
    before = known.read_text() if resumed and known.exists() else None
    if tracker == "wandb":
        again = {} if before is None else {"id": before, "resume": "allow"}
        made = make(PROJECT, name=name, dir=os.environ.get("WANDB_DIR", str(folder)), **again)
    else:
        os.environ.setdefault(_URI, f"sqlite:///{folder / 'mlflow.db'}")
        place = (folder / "mlflow").as_uri()
        made = make(PROJECT, logging_dir=place, run_name=name, run_id=before)
    made.start()
    if before is None:  # MLflow takes each setting once
        made.store_init_configuration(_flat(config))
        write_text(known, made.tracker.id if tracker == "wandb" else made.tracker.info.run_id)
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
