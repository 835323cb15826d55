"""One dense model or one run of a sweep, in whatever process: resumed, and kept if it fails.

A directory is finished when it holds ``done``; what failed holds ``error.txt``. Only one process
at a time works in it, so that a sweep that is started twice does nothing twice.
"""

from __future__ import annotations

import functools
import re
import shutil
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock

import domains
from cli.options.failures import FAILURES, sentence
from cli.output import note, write_json, write_text
from cli.running.job import Job, make_job
from cli.running.made import is_record
from cli.running.pipeline import run_pipeline, train_dense
from cli.running.saved import check_saved
from cli.running.settings import controlled
from cli.running.starts import DIGITS, TIMM
from cli.sweeps.grid import Cell
from cli.sweeps.options import arguments, parsed
from depgraph import DepgraphError
from domains import DomainData

DONE, ERROR, LOCK = "done", "error.txt", ".lock"

_RESULTS = ("result.json", "dense-accuracy.json")
"""What a finished run, or a finished dense model, has left."""
_MODELS = re.compile(r"(dense|pruned-only|pruned|shrunk|(cut|step)-\d+)(-training)?")
"""How the directories are called that a run leaves."""


@dataclass(frozen=True)
class Place:
    """What all work of a sweep has in common; plain, so that it can be sent to other machines.

    Attributes
    ----------
    out, data : Path
        Directory of the sweep; folder of the images.
    digits : bool
        Whether these are the embedded digits, with their own models and recipes.
    keep_models : bool
    threads : int, optional
        CPU threads of a process; None: as torch is set.
    workers : int
        Runs that are at work at the same time.
    command : str
        The command line of the sweep.
    """

    out: Path
    data: Path
    digits: bool = False
    keep_models: bool = False
    threads: int | None = None
    workers: int = 1
    command: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a dense model or a run; `error` is None where it is done."""

    name: str
    error: str | None = None


def job_of(place: Place, cell: Cell, found: DomainData) -> Job:
    """What a run of the sweep does, as `run` would do it.

    Raises
    ------
    DepgraphError
        For options that `run` refuses.
    """
    options = parsed(cell.options)
    job = make_job(found, DIGITS if place.digits else TIMM, **options)
    settings = replace(job.settings, model=cell.label)
    if cell.control is not None:
        settings = controlled(settings, cell.control)
    return replace(job, settings=settings)


def check_model(place: Place, cell: Cell) -> None:
    """Refuse a model that cannot be made, without making it."""
    options = parsed(cell.options)
    names = ("pretrained", "weights", "img_size", "model_args")
    start = DIGITS if place.digits else TIMM
    start.check(options["model_name"], **{name: options[name] for name in names})
    if options["dense"] is not None:
        check_saved(options["dense"])


def dense_directory(place: Place, key: str) -> Path:
    """Where a dense model is that runs share."""
    return place.out / "dense" / key


def work_on_dense(place: Place, key: str, cell: Cell) -> Outcome:
    """Train a dense model and measure its accuracy, unless that is done or has failed before.

    Parameters
    ----------
    place : Place
    key : str
        Name of its directory.
    cell : Cell
        One of the runs that start from it.
    """
    out = dense_directory(place, key)

    def work() -> None:
        job = job_of(place, cell, _data(place.data))
        train_dense(job.model, job.split, job.settings, out, log=_timed_note)
        shutil.rmtree(out / "dense-training", ignore_errors=True)

    return _attempt(out, key, place.threads, work)


def work_on_run(place: Place, key: str, cell: Cell, dense: Outcome) -> Outcome:
    """Do a run, unless that is done or has failed before, or its dense model has.

    Parameters
    ----------
    place : Place
    key : str
        Of its dense model.
    cell : Cell
    dense : Outcome
        Of its dense model.
    """
    if dense.error is not None:
        return Outcome(cell.name, f"its dense model failed: {dense.error}")
    out = place.out / cell.name

    def work() -> None:
        if not is_record(out / "result.json"):
            (out / "result.json").unlink(missing_ok=True)  # damaged
            _write_config(place, cell, out)
            job = job_of(place, cell, _data(place.data))
            beside = {"sweep": {"run": cell.name, "workers": place.workers}}
            run_pipeline(
                job.model,
                job.split,
                job.settings,
                out,
                resume=True,
                dense_at=dense_directory(place, key),
                fresh=job.fresh,
                log=_timed_note,
                more={**beside, "command": place.command},
            )
        for folder in (path for path in out.iterdir() if _MODELS.fullmatch(path.name)):
            if not place.keep_models or folder.name.endswith("-training"):
                shutil.rmtree(folder)

    return _attempt(out, cell.name, place.threads, work)


def status(directory: Path) -> Outcome | None:
    """What came of earlier work in a directory; None where there is work to do.

    What is said to be done and has no result that can be read is to be done again.
    """
    if (directory / DONE).exists() and any(is_record(directory / name) for name in _RESULTS):
        return Outcome(directory.name)
    if (directory / ERROR).exists():
        text = (directory / ERROR).read_text(encoding="utf-8")
        return Outcome(directory.name, text.partition("\n")[0])
    return None


def check_directory(directory: Path, force: bool) -> None:
    """Refuse to work in a directory that has something in it, and no sweep's lock.

    Raises
    ------
    DepgraphError
        Naming it and the ways out.
    """
    if directory.exists() and not directory.is_dir():
        raise DepgraphError(f"'{directory}' is in the way; move it, or choose another --out")
    if directory.is_dir() and not force:
        there = {path.name for path in directory.iterdir()}
        if there and not there & {LOCK, ERROR}:
            raise DepgraphError(
                f"'{directory}' was not made by a sweep; choose another --out, or write there all "
                "the same with --force"
            )


def fail(directory: Path, text: str) -> Outcome:
    """Write down that work has failed; its first line says why."""
    write_text(directory / ERROR, text)
    return Outcome(directory.name, text.partition("\n")[0])


def _attempt(out: Path, name: str, threads: int | None, work: Callable[[], None]) -> Outcome:
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    with FileLock(out / LOCK, mode=0o666):
        earlier = status(out)
        if earlier is not None:
            return earlier
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            with (out / "log.txt").open("a", buffering=1) as log, redirect_stderr(log):
                work()
        except FAILURES as error:
            return fail(out, f"{sentence(error)}\n\n{traceback.format_exc()}")
        finally:
            torch.set_num_threads(before)
        write_text(out / DONE, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n")
    return Outcome(name)


def _write_config(place: Place, cell: Cell, out: Path) -> None:
    write_json(
        out / "config.json", {**asdict(cell), "arguments": ["run", *arguments(cell.options)]}
    )


def _timed_note(text: str) -> None:
    note(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")


@functools.lru_cache(maxsize=2)
def _data(root: Path) -> DomainData:
    return domains.load_domains(root, verify=False)  # verified once, before the first run


def thinned(found: DomainData) -> DomainData:
    """Two images of each class: enough to turn options into settings, and to find bad ones fast."""
    return replace(
        found,
        samples={
            domain: tuple(
                sample
                for label in range(len(found.classes))
                for sample in [s for s in samples if s.label == label][:2]
            )
            for domain, samples in found.samples.items()
        },
    )
