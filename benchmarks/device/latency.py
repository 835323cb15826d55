"""(b) Latency and throughput, dense and cut, in turns with the floor of the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.device.environment import empty_op, wake
from benchmarks.device.models import DENSE, cuts, dense_model, images_for, latency_of
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Case, Settings
from benchmarks.device.tables import Table, digits, padded
from benchmarks.runtimes import PRECISIONS, Forward, check_compiler, make
from domains.measuring.stand import room_to_compile
from domains.measuring.timing import TimingSettings, in_turns

COMPILED = ("0.5 of the MACs",)
"""Cuts that are compiled: each takes as long as all others together."""


def plain(record: Record, settings: Settings, label: str) -> None:
    """Time the dense model and its cuts."""
    model = dense_model(settings, label)
    models = _placed(record, settings, model)
    _measure(record, settings, models, settings.sizes.plain[label])


def auto(record: Record, settings: Settings, label: str) -> None:
    """The same of cuts to sizes that the device is fast at."""
    model = dense_model(settings, label)
    latency = latency_of(settings, model)
    models = _placed(record, settings, model, round_to="auto", latency=latency)
    _measure(record, settings, models, settings.sizes.auto[label])


def compiled(record: Record, settings: Settings, label: str) -> None:
    """The dense model and one cut, by ``torch.compile``."""
    model = dense_model(settings, label)
    models = _placed(record, settings, model, only=COMPILED)
    _measure(record, settings, models, settings.sizes.compiled[label])


def _placed(
    record: Record, settings: Settings, model: nn.Module, **how: Any
) -> dict[str, nn.Module]:
    """The dense model and its cuts, in float32 on the device; their sizes go to the record."""
    costs: dict[str, Any] = {}
    models = {}
    for name, small, cost in cuts(settings, model, **how):
        models[name] = small.eval().to(settings.device)
        costs[name] = cost
    record.facts["cuts"] = costs
    return {DENSE: model.to(settings.device), **models}


def _measure(
    record: Record,
    settings: Settings,
    models: Mapping[str, nn.Module],
    cases: tuple[Case, ...],
) -> None:
    for case in cases:
        precision, batch, runtime = case
        record.attempt(
            f"{precision}, batch {batch}, {runtime}",
            lambda case=case: _case(settings, models, case),  # type: ignore[misc]
        )


def _case(settings: Settings, models: Mapping[str, nn.Module], case: Case) -> Row:
    precision, batch, runtime = case
    images = images_for(models[DENSE], batch, settings.device, precision)
    clock = TimingSettings(batch, seconds=settings.sizes.seconds, min_rounds=5, warmup_rounds=2)
    with torch.no_grad(), room_to_compile(len(models)):
        torch._dynamo.reset()
        runs = [_made(runtime, _cast(m, precision), images) for m in models.values()]
        floor = empty_op(settings.device, runtime)
        wake(settings.device)
        times = in_turns([*runs, floor], images, clock)
    torch._dynamo.reset()
    return {
        "floor_ms": float(np.median(times[:, -1])) * 1e3,
        "rounds": len(times),
        "models": {
            name: {
                "ms": float(np.median(times[:, i])) * 1e3,
                "iqr_ms": float(np.subtract(*np.percentile(times[:, i], [75, 25]))) * 1e3,
                "images_per_second": batch / float(np.median(times[:, i])),
                "speedup": float(np.median(times[:, 0] / times[:, i])),
            }
            for i, name in enumerate(models)
        },
    }


def _made(runtime: str, model: nn.Module, images: Tensor) -> Forward:
    if runtime != "compile":
        return make(runtime, model, images)
    check_compiler(images)
    # no reset between models, as `make` does: all of a case are called in turns
    run: Forward = torch.compile(model, dynamic=False)
    run(images)
    return run


def _cast(model: nn.Module, precision: str) -> nn.Module:
    return model if precision == "fp32" else copy.deepcopy(model).to(PRECISIONS[precision])


def tables(record: Record) -> list[Table]:
    """Milliseconds and speed-ups of each case; images per second at the dense model's side."""
    costs = record.facts.get("cuts", {})
    heads = [f"{name} ({cost['macs_kept']:.3f} MACs)" for name, cost in costs.items()]
    columns = ["case", "floor, ms", "dense, ms (images/s)", *heads]
    lines = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        dense = row["models"][DENSE]
        first = f"{digits(dense['ms'])} ({dense['images_per_second']:.0f})"
        cells = [f"{digits(m['ms'])} ({m['speedup']:.2f}x)" for n, m in row["models"].items()
                 if n != DENSE]  # fmt: skip
        lines.append((key, digits(row["floor_ms"]), first, *cells))
    return [Table("", columns, lines)]
