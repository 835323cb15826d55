"""All steps, most important first, with what each does and how long it may take."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.device import (
    accuracy,
    distributed,
    engine,
    environment,
    latency,
    quantised,
    smoke,
    table,
    training,
)
from benchmarks.device.record import Record
from benchmarks.device.settings import NAMES, Settings
from benchmarks.device.tables import Table

Run = Callable[[Record, Settings], None]


@dataclass(frozen=True)
class Step:
    """One part of what is measured.

    Attributes
    ----------
    name : str
        Of its file.
    title : str
        Of its section of the page.
    seconds : float
        Limit of the whole on a GPU; see `limit`.
    run : callable
        Measures, in a process of its own.
    tables : callable
        What the page shows of the record.
    skip : callable
        Why the settings have no such step; None where they have.
    """

    name: str
    title: str
    seconds: float
    run: Run
    tables: Callable[[Record], list[Table]]
    skip: Callable[[Settings], str | None] = lambda settings: None

    def limit(self, settings: Settings) -> float:
        """Seconds that the step may take."""
        if not settings.cuda:
            return 40 * self.seconds if settings.size == "full" else 10 * self.seconds
        return self.seconds * (1.0 if settings.size == "full" else 0.5)

    def identity(self, settings: Settings) -> dict[str, Any]:
        """What decides its results beside device and size."""
        if self.run is not accuracy.run:
            return {}
        weights = settings.weights
        digest = None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        data = None if settings.data is None else str(settings.data.resolve())
        return {"data": data, "weights": digest, "model": settings.model}


def _unless(cases: str, label: str, settings: Settings) -> str | None:
    known: Mapping[str, Any] = getattr(settings.sizes, cases)
    return None if label in known else f"not part of --{settings.size}"


def _timed(label: str, how: str, seconds: float) -> Step:
    titles = {
        "plain": "eager and CUDA graphs",
        "auto": "sizes by --round-to auto",
        "compiled": "torch.compile",
    }
    return Step(
        f"latency-{label.lower()}-{how}",
        f"Latency of {label} ({NAMES[label]}), {titles[how]}",
        seconds,
        functools.partial(getattr(latency, how), label=label),
        latency.tables,
        functools.partial(_unless, how, label),
    )


def _no_data(settings: Settings) -> str | None:
    return "no folder of images was given; --data ROOT" if settings.data is None else None


FIRST = Step("environment", "Machine", 40, environment.run, environment.tables)
STEPS = (
    FIRST,
    Step("smoke", "Smoke test of every CUDA path", 60, smoke.run, smoke.tables),
    _timed("ViT-B", "plain", 80),
    _timed("ViT-B", "auto", 130),
    _timed("BEiT-B", "plain", 50),
    _timed("DeiT-B", "plain", 40),
    Step("training", "Training in bfloat16", 40, training.run, training.tables),
    Step("table", "Latency predicted and measured", 60, table.run, table.tables),
    Step("accuracy", "Accuracy on unseen domains", 200, accuracy.run, accuracy.tables, _no_data),
    Step("engine", "Engine", 50, engine.run, engine.tables),
    Step("distributed", "DDP and FSDP on one rank", 40, distributed.run, distributed.tables),
    Step("quantised", "Int8 and 2:4", 60, quantised.run, quantised.tables),
    _timed("ViT-B", "compiled", 80),
    _timed("BEiT-B", "auto", 90),
    _timed("DeiT-B", "auto", 50),
)
BY_NAME = {step.name: step for step in STEPS}
