"""Directories that this tool saved models in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import depgraph
from depgraph import DepgraphError
from depgraph.storing.hub import fetch, is_hub_name
from depgraph.storing.reading import read_text


def load_saved(directory: Path, *, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The model that `prune`, `finetune` or `run` left in a directory, in eval mode.

    Parameters
    ----------
    directory : Path
        Of the model, or of a run: then its pruned model.
    num_classes : int, optional
        Another number than it has gives it a new head, and says so.
    seed : int
        Of the new head.

    Raises
    ------
    DepgraphError
        When there is none, or it cannot have that many classes.
    """
    model = depgraph.load(check_saved(directory)).eval()
    if num_classes is None or num_classes == getattr(model, "num_classes", num_classes):
        return model
    reset = getattr(model, "reset_classifier", None)
    if reset is None:
        raise DepgraphError(
            f"'{directory}' has {model.num_classes} classes and cannot be given {num_classes}"
        )
    torch.manual_seed(seed)
    reset(num_classes)
    click.echo(f"note: '{directory}' gets a head for {num_classes} classes, at random", err=True)
    return model.eval()


def check_saved(directory: Path) -> Path:
    """Where the saved model of a directory is; refused where there is none."""
    place = saved_in(directory)
    if place is None:
        what = "has no saved model in it" if directory.is_dir() else "is no directory"
        raise DepgraphError(f"'{directory}' {what}; give one that prune, finetune or run wrote")
    return place


def saved_in(directory: Path) -> Path | None:
    """Where the saved model is: the directory itself, or ``pruned`` of a run's directory.

    One on the Hugging Face hub, ``hf-hub:owner/name``, is fetched.
    """
    if is_hub_name(directory):
        return fetch(str(directory))
    for place in (directory, directory / "pruned"):
        if is_saved_model(place):
            return place
    return None


def is_saved_model(place: Path) -> bool:
    """Whether a directory holds a model of this tool, of an earlier form too: loading says so."""
    return any((place / name).exists() for name in ("plan.json", "structure.json"))


def save_model(model: nn.Module, directory: Path) -> None:
    """Save a model that another command shall load: of a class that a library makes.

    Raises
    ------
    DepgraphError
        When the model cannot be made again from what is known of it.
    """
    depgraph.save(model, directory, source=depgraph.source_of(model))


def read_record(path: Path) -> dict[str, Any]:
    """An object that a program wrote down as JSON.

    Raises
    ------
    DepgraphError
        When the file cannot be read, or holds no object.
    """
    text = read_text(path.parent, path.name)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DepgraphError(
            f"'{path}' is damaged: {error}; make it anew, or choose another directory"
        ) from error
    if not isinstance(record, dict):
        raise DepgraphError(f"'{path}' holds no JSON object; choose another directory")
    return record


def compensated_share(directory: Path) -> float | None:
    """Share of the MACs that `prune` left in this directory, if it compensated the cut."""
    record = directory / "prune.json"
    if not record.exists():
        return None
    row = read_record(record)
    try:
        return row["pruned"]["macs"] / row["dense"]["macs"] if row["compensated"] else None
    except (KeyError, TypeError) as error:
        raise DepgraphError(f"'{record}' is no record that prune wrote ({error})") from error


def dense_of(directory: Path) -> Path | None:
    """The dense model that a run left beside its pruned one, if any."""
    place = saved_in(directory)
    dense = None if place is None else place.parent / "dense"
    return dense if dense is not None and is_saved_model(dense) else None
