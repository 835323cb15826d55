"""(f) Time and memory of the engine, and of scores from data, with the model on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import depgraph
import pruners
from benchmarks.device.models import dense_model, images_for
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings
from benchmarks.device.tables import Table, digits, padded
from benchmarks.engine import STEPS, Stopwatch, peak_memory

METRICS = ("taylor", "hessian", "obs")


def run(record: Record, settings: Settings) -> None:
    """A cut by L2, each metric alone, and a cut by OBS with compensation."""
    for label in settings.sizes.models:
        model = dense_model(settings, label).to(settings.device)
        record.attempt(f"{label}, L2", functools.partial(_steps, settings, model))
        for metric in METRICS:
            record.attempt(
                f"{label}, score: {metric}", functools.partial(_score, settings, model, metric)
            )
        record.attempt(
            f"{label}, OBS and compensation", functools.partial(_compensated, settings, model)
        )


def _steps(settings: Settings, model: nn.Module) -> Row:
    watch, found = Stopwatch(), Row()
    example = images_for(model, 1, settings.device)
    with _peak(settings, found):
        graph = _synced(settings, watch, STEPS[0], lambda: depgraph.trace(model, example))
        scores = _synced(settings, watch, STEPS[1], lambda: pruners.score(model, graph, "l2"))
        kept = _synced(
            settings, watch, STEPS[2], lambda: pruners.allocate(graph, scores, ratio=0.5)
        )
        plan = _synced(settings, watch, STEPS[3], lambda: graph.plan(kept))
        _synced(settings, watch, STEPS[4], lambda: plan.apply(model))
    return found | {"steps": watch.seconds, "seconds": sum(watch.seconds.values())}


def _score(settings: Settings, model: nn.Module, metric: str) -> Row:
    watch, found = Stopwatch(), Row()
    batches = _batches(settings, model)
    graph = depgraph.trace(model, batches[0][0][:1])
    with _peak(settings, found):
        _synced(settings, watch, "score", lambda: pruners.score(model, graph, metric, batches))
    return found | {"seconds": watch.seconds["score"]}


def _compensated(settings: Settings, model: nn.Module) -> Row:
    watch, found = Stopwatch(), Row()
    batches = _batches(settings, model)

    def cut() -> Any:
        example = batches[0][0][:1]
        return pruners.prune(
            model, example, "obs", target={"macs": 0.5}, kinds="auto", batches=batches
        )

    with _peak(settings, found):
        _synced(settings, watch, "cut", cut)
    return found | {"seconds": watch.seconds["cut"]}


def _batches(settings: Settings, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = images_for(model, settings.sizes.samples, settings.device)
    classes = torch.arange(len(images), device=images.device)
    size = min(16, len(images))
    return list(zip(images.split(size), classes.split(size), strict=True))


def _synced(settings: Settings, watch: Stopwatch, name: str, work: Any) -> Any:
    def whole() -> Any:
        result = work()
        if settings.cuda:
            torch.cuda.synchronize()
        return result

    return watch(name, whole)


@contextmanager
def _peak(settings: Settings, found: Row) -> Iterator[None]:
    """Memory above what was there: of the GPU's allocator, or resident on the CPU."""
    if not settings.cuda:
        with peak_memory(found):
            yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()
    found["peak_extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20


def tables(record: Record) -> list[Table]:
    """Seconds of each step and in all, and memory."""
    columns = ("what", *STEPS, "seconds", "peak above the model, MiB")
    lines: list[tuple[str, ...]] = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        steps = [digits(row["steps"][s]) if "steps" in row else "" for s in STEPS]
        lines.append((key, *steps, digits(row["seconds"]), f"{row['peak_extra_mib']:.0f}"))
    return [Table("Seconds by the wall clock, once each, the GPU waited for.", columns, lines)]
