"""(d) The latency table of this device, and how far its predictions are off."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from torch import nn

from benchmarks.device.models import dense_model, latency_of
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings, ViT
from benchmarks.device.tables import Table, digits, padded
from benchmarks.latency_model import measure_one
from benchmarks.runtimes import PRECISIONS
from domains.measuring.timing import TimingSettings
from pruners.speed.context import random_sizes
from pruners.speed.latency import LatencyModel


def run(record: Record, settings: Settings) -> None:
    """Measure the table, unless an earlier step did, and time random plans beside it."""
    model = dense_model(settings, ViT)
    latency = latency_of(settings, model)
    precision, batch, _ = settings.sizes.table
    record.facts.update(
        precision=precision,
        batch=batch,
        grids=len(latency.table.grids),
        dense_ms_predicted=latency.dense_ms,
    )
    record.save()
    clock = TimingSettings(
        batch,
        settings.device,
        seconds=2 * settings.sizes.seconds,
        min_rounds=5,
        warmup_rounds=1,
        dtype=str(PRECISIONS[precision]).removeprefix("torch."),
    )
    draw = random.Random(0)
    for number in range(settings.sizes.plans):
        sizes = random_sizes(latency.graph, draw)
        record.attempt(
            f"plan {number}",
            lambda sizes=sizes: _row(model, latency, sizes, clock),  # type: ignore[misc]
        )


def _row(
    model: nn.Module, latency: LatencyModel, sizes: Mapping[str, int], clock: TimingSettings
) -> Row:
    return dict(measure_one(model, latency, sizes, clock))


def tables(record: Record) -> list[Table]:
    """Each plan, and the errors of all."""
    columns = ("plan", "MACs kept", "predicted", "measured", "off by")
    lines = []
    errors = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        errors.append(abs(row["error"]))
        shares = (f"{row[name]:.3f}" for name in ("macs", "predicted", "measured"))
        lines.append((key, *shares, f"{row['error']:+.1%}"))
    facts = record.facts
    says = ""
    if facts:
        says = (
            f"Random plans of {ViT}, {facts['precision']}, batch {facts['batch']}; latency as a "
            f"share of the dense model's ({digits(facts['dense_ms_predicted'])} ms predicted); "
            f"{facts['grids']} grids of ops measured."
        )
    if errors:
        says += f" Off by {np.median(errors):.1%} in the median, {max(errors):.1%} at the most."
    return [Table(says, columns, lines)]
