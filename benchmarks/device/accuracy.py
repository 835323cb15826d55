"""(e) Accuracy on unseen domains of a small real set, by the project's own sweep."""

from __future__ import annotations

import json
from pathlib import Path

import domains
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings
from benchmarks.device.tables import Table, padded
from cli.commands.sweep import _tasks
from cli.output import percent, write_text
from cli.sweeps.grid import read_grid
from cli.sweeps.work import ERROR, Place, work_on_dense, work_on_run
from cli.sweeps.workers import Task

SHARE = 0.5
"""Of the MACs, kept."""


def run(record: Record, settings: Settings) -> None:
    """Each target with each seed, all targets of a seed first."""
    assert settings.data is not None  # the step is left out otherwise
    found = domains.load_domains(settings.data)
    targets = list(found.domains)[: settings.sizes.targets]
    folder = settings.out / "accuracy"
    file = folder / "grid.toml"
    write_text(file, _grid(settings, targets))
    grid = read_grid(file)
    place = Place(out=folder, data=settings.data, command="benchmarks.device")
    record.facts.update(
        model=settings.model,
        weights="random" if settings.weights is None else settings.weights.name,
        epochs=settings.sizes.epochs,
        images=sum(len(samples) for samples in found.samples.values()),
        classes=len(found.classes),
    )
    record.save()
    for task in _tasks(place, grid, found):
        options = task.cell.options
        record.attempt(
            f"{options['target']}, seed {options['seed']}",
            lambda task=task: _result(place, task),  # type: ignore[misc]
        )


def _grid(settings: Settings, targets: list[str]) -> str:
    """The file of the sweep; JSON's strings, numbers and lists are TOML's too."""
    sizes = settings.sizes
    said = {
        "data": str(settings.data),
        "targets": targets,
        "seeds": list(range(sizes.seeds)),
        "target_macs": SHARE,
        "dense_epochs": sizes.epochs,
        "epochs": sizes.epochs,
        "device": settings.device,
        "amp": settings.cuda,
        "bench_seconds": 0.2,
    }
    model = {"name": settings.model, "pretrained": False}
    if settings.weights is not None:
        model["weights"] = str(settings.weights)
    lines = [f"{name} = {json.dumps(value)}" for name, value in said.items()]
    lines += ["[[models]]", *(f"{name} = {json.dumps(value)}" for name, value in model.items())]
    if settings.sizes.width:
        lines += ["[models.model_args]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in sizes.width.items()]
    return "\n".join(lines) + "\n"


def _result(place: Place, task: Task) -> Row:
    """A run's accuracies; a failure that an earlier call left is tried again."""
    for folder in (place.out / "dense" / task.dense, place.out / task.cell.name):
        (folder / ERROR).unlink(missing_ok=True)
    dense = work_on_dense(place, task.dense, task.cell)
    outcome = work_on_run(place, task.dense, task.cell, dense)
    if outcome.error is not None:
        raise RuntimeError(outcome.error)
    row = json.loads((place.out / task.cell.name / "result.json").read_text(encoding="utf-8"))
    keys = ("source_accuracy", "target_accuracy")
    found: Row = {
        name: {key: row[name][key] for key in keys} for name in ("dense", "pruned_only", "pruned")
    }
    found["macs_kept"] = row["pruned"]["macs"] / row["dense"]["macs"]
    found["run"] = str(Path("accuracy") / task.cell.name)
    return found


def tables(record: Record) -> list[Table]:
    """A line for each run, and the means."""
    columns = ("unseen, seed", "dense: sources", "unseen", "cut: unseen", "recovered: sources",
               "unseen", "MACs kept")  # fmt: skip
    lines: list[tuple[str, ...]] = []
    found = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        found.append(_cells(row))
        lines.append((key, *map(percent, found[-1][:-1]), f"{found[-1][-1]:.3f}"))
    if len(found) > 1:
        means = [sum(column) / len(found) for column in zip(*found, strict=True)]
        lines.append((f"mean of {len(found)}", *map(percent, means[:-1]), f"{means[-1]:.3f}"))
    facts = record.facts
    says = ""
    if facts:
        says = (
            f"{facts['model']}, weights {facts['weights']}; {facts['images']} images of "
            f"{facts['classes']} classes; {facts['epochs']} epochs dense, as many after the cut to "
            f"{SHARE:g} of the MACs; otherwise as `run` does it."
        )
    return [Table(says, columns, lines)]


def _cells(row: Row) -> list[float]:
    dense, cut, after = row["dense"], row["pruned_only"], row["pruned"]
    return [
        dense["source_accuracy"],
        dense["target_accuracy"],
        cut["target_accuracy"],
        after["source_accuracy"],
        after["target_accuracy"],
        row["macs_kept"],
    ]
