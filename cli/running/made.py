"""Whether what is in a place is this tool's own: only that is overwritten without ``--force``.

A page, table, graph or program for serving holds `MARK`; a record of JSON says which version wrote
it or what a stage was made with; a saved model says its format; a checkpoint of a training loads as
one. All else was made by somebody else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from cli.output import check_replaceable
from depgraph import DepgraphError
from depgraph.files import MARK
from depgraph.storing.checkpoint import INDEX, WEIGHTS
from depgraph.storing.reading import read_text
from domains.training.checkpoint import is_checkpoint

force_option = click.option(
    "--force", is_flag=True, help="Overwrite what this tool did not make, too."
)

CSV_HEADERS = ("data,model,metric,budget,share,", "model,metric,budget,share,variant,")
"""How tables of CSV begin, which have no room for a mark."""

_ENDS = 2**20
"""Bytes at both ends of a file in which the mark is looked for."""


def check_files(paths: Iterable[Path], force: bool, option: str = "--out") -> None:
    """Refuse to overwrite a file that this tool did not make.

    Parameters
    ----------
    paths : iterable of Path
    force : bool
        Overwrite whatever is an ordinary file.
    option : str
        The one that says where to write.

    Raises
    ------
    DepgraphError
        Naming the file and the ways out.
    """
    for path in paths:
        check_replaceable(path)
        if path.exists() and not force and not is_own_file(path):
            raise DepgraphError(_refusal(f"'{path}' was not made by this tool", option))


def check_model_place(directory: Path, force: bool, option: str = "--out") -> None:
    """Refuse to save a model among files that this tool did not make.

    Parameters
    ----------
    directory : Path
        Free where it holds a saved model of this tool, or none of the files that one consists of.
    force : bool
    option : str

    Raises
    ------
    DepgraphError
        Naming what is in the way and the ways out.
    """
    own = holds_model(directory)
    if force:
        for name in () if own else (INDEX, WEIGHTS, "plan.json"):  # a model of somebody else
            if (directory / name).exists():
                (directory / name).rename(directory / f"{name}.replaced")
        return
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if not _fits(path, own):
            raise DepgraphError(_refusal(f"'{path}' was not made by this tool", option))


def check_run_place(out: Path, stages: Iterable[str], *, resume: bool, force: bool) -> None:
    """Refuse to do a run among files that this tool did not make; with `force`, begin it anew.

    Parameters
    ----------
    out : Path
    stages : iterable of str
        Of the run.
    resume : bool
        Whether to continue a run that is there.
    force : bool
        Whether to overwrite what is there: alone, a run too; with `resume`, only what is no run's.

    Raises
    ------
    DepgraphError
        Naming what is in the way and the ways out.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (resume or force):
        raise DepgraphError(
            f"'{out}' is not empty; choose another --out, continue it with --resume, or overwrite "
            "it with --force"
        )
    stages = list(stages)
    own = _is_run(out, stages)
    if force and not (own and resume):
        forget_run(out, stages)
        for stage in stages:
            check_model_place(out / stage, True)
    elif not own:
        check_files([out / name for name in ("result.json", "report.html")], False)
        check_files([out / f"{stage}.json" for stage in stages], False)
        for stage in stages:
            check_model_place(out / stage, False)
            training = out / f"{stage}-training"
            if training.exists() and not is_training(training):
                raise DepgraphError(_refusal(f"'{training}' was not made by this tool", "--out"))


def _is_run(out: Path, stages: Iterable[str]) -> bool:
    """Whether a run has begun in a directory: then what is called as its files are is its own."""
    return any(
        is_record(out / f"{stage}.json") or is_checkpoint(out / f"{stage}-training/checkpoint.pt")
        for stage in stages
    )


def forget_run(out: Path, stages: Iterable[str]) -> None:
    """Remove what would be resumed or taken as finished, and nothing else."""
    for stage in stages:
        (out / f"{stage}.json").unlink(missing_ok=True)
        (out / f"{stage}-training" / "checkpoint.pt").unlink(missing_ok=True)
    (out / "result.json").unlink(missing_ok=True)


def holds_model(directory: Path) -> bool:
    """Whether a directory holds a model that this tool saved."""
    config = _json(directory / "config.json")
    return isinstance(config, dict) and "depgraph_format" in config


def is_own_file(path: Path) -> bool:
    """Whether this tool made a file."""
    if path.suffix == ".json":
        return is_record(path)
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(path.stat().st_size - _ENDS, 0))
        tail = file.read()
    headers = tuple(header.encode() for header in CSV_HEADERS)
    return MARK.encode() in head or MARK.encode() in tail or head.startswith(headers)


def is_record(path: Path) -> bool:
    """Whether a file is JSON that a command or a stage of a run wrote down."""
    record = _json(path)
    if not isinstance(record, dict):
        return False
    versions = record.get("versions")
    by_command = isinstance(versions, dict) and "depgraph-prune" in versions
    return by_command or isinstance(record.get("made_with"), dict)


def is_training(folder: Path) -> bool:
    """Whether a training can write its checkpoint to a folder: over its own, or where none is."""
    if not folder.is_dir():
        return False
    checkpoint = folder / "checkpoint.pt"
    return not checkpoint.exists() or is_checkpoint(checkpoint)


_RECORDS = ("prune.json", "finetune.json")


def _fits(path: Path, own: bool) -> bool:
    """Whether something in a directory is not in the way of a model that is saved there."""
    if path.name in _RECORDS:
        return is_record(path)
    if path.name == "training":
        return is_training(path)
    return own or path.suffix not in (".json", ".safetensors")


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path.parent, path.name))
    except (ValueError, RecursionError):  # DepgraphError among them
        return None


def _refusal(what: str, option: str) -> str:
    return f"{what}; choose another {option}, or overwrite it with --force"
