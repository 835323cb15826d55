"""The whole job in stages that can be resumed: dense, pruned, recovered, evaluated, timed.

Each finished stage leaves ``<stage>.json`` in the run's directory with the settings it was made
with; ``--resume`` takes such a stage as it is, and refuses one that was made otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import pruners
from cli.running.made import check_run_place
from cli.running.run_stages import Stages, stage_names
from cli.running.settings import RunSettings
from depgraph import DepgraphError
from domains import Split
from domains.running import processes


def run_pipeline(
    model: Callable[[], nn.Module],
    split: Split,
    settings: RunSettings,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    dense_at: Path | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    log: Callable[[str], None] | None = None,
    more: Mapping[str, Any] | None = None,
    track: str | None = None,
) -> dict[str, Any]:
    """Fine-tune, prune, fine-tune again, evaluate and time.

    Parameters
    ----------
    model : callable
        Gives the pretrained model, on the CPU; not called when its stage is finished.
    split : Split
    settings : RunSettings
    out : Path
        The run's directory, new or empty unless `resume`. Gets the models ``dense``,
        ``pruned-only`` and ``pruned``, and ``result.json``.
    resume : bool
        Take finished stages as they are, and continue an unfinished one. A finished run is left
        as it is.
    force : bool
        Begin anew in a directory that is not empty, over what is called as a run's files are.
    progress : bool
        Bars on standard error.
    dense_at : Path, optional
        Where `train_dense` left the dense model that several runs start from; by default it is
        made in `out`.
    fresh : callable, optional
        Gives the model with weights drawn anew; for the control "reinit" alone.
    log : callable, optional
        Gets a line as each stage begins; by default standard error, if there is `progress`.
    more : mapping, optional
        What else is put into the row.
    track : str or None
        One of `cli.options.tracking.TRACKERS`, to log the epochs of both trainings to.

    Returns
    -------
    dict
        The result row, as `run --json` prints it.

    Raises
    ------
    DepgraphError
        For a directory in use, a stage made with other settings, and whatever a stage refuses.
    """
    processes.join(settings.device)
    if processes.is_main():
        check_run_place(out, stage_names(settings), resume=resume, force=force)
    _check_enough(split, settings)
    stages = Stages(model, split, settings, out, progress, dense_at or out, fresh, log, track)
    stages.dense()
    stages.scheduled()
    stages.pruned()
    stages.recovered()
    return stages.result(more or {})


def _check_enough(split: Split, settings: RunSettings) -> None:
    """Refuse, before any training, more images than the cut will find."""
    if settings.control == "dense" or settings.calibration != "plain":
        return
    images = sum(map(len, split.train.values()))
    wanted = {
        "num_samples": pruners.make_metric(settings.pruning["metric"]).needs_data,
        "num_calibration": settings.pruning.get("compensate") is not False,
    }
    for name, looks in wanted.items():
        number = settings.pruning.get(name)
        if looks and number is not None and number > images:
            raise DepgraphError(
                f"the sources have {images} images for training, fewer than {name}={number}; ask "
                "for at most that many"
            )


def train_dense(
    model: Callable[[], nn.Module],
    split: Split,
    settings: RunSettings,
    out: Path,
    *,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
) -> None:
    """The first stage alone, resumed where it was begun: for runs that share their dense model.

    Parameters are those of `run_pipeline`, whose `dense_at` is this `out`.
    """
    stages = Stages(model, split, settings, out, progress, out, None, log, None)
    stages.dense()
    stages.dense_accuracy()
