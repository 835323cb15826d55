"""(c) Steps per second and peak memory of training in bfloat16, dense and cut."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.device.models import DENSE, cuts, dense_model, shape_of
from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings
from benchmarks.device.tables import Table, digits, padded
from domains.measuring.timing import TimingSettings
from domains.measuring.training_timing import compare_training


def run(record: Record, settings: Settings) -> None:
    """Time the dense model and its cuts in turns, a row for each model."""
    record.facts.update(batch=settings.sizes.batch)
    for label in settings.sizes.models:
        record.attempt(label, lambda label=label: _trained(settings, label))  # type: ignore[misc]


def _trained(settings: Settings, label: str) -> Row:
    model = dense_model(settings, label)
    models = {DENSE: model, **{name: small for name, small, _ in cuts(settings, model)}}
    sizes = settings.sizes
    clock = TimingSettings(
        sizes.batch,
        settings.device,
        seconds=2 * sizes.seconds,
        min_rounds=5,
        warmup_rounds=2,
        amp="bf16",
    )
    times = compare_training(models, shape_of(model), clock)
    return {"models": {name: asdict(timed) for name, timed in times.items()}}


def tables(record: Record) -> list[Table]:
    """A line for each cut of each model."""
    columns = ("model", "cut", "step, ms", "steps/s", "images/s", "speed-up", "peak, MiB")
    lines: list[tuple[str, ...]] = []
    for key, row in record.rows.items():
        without = padded(key, row, len(columns))
        if without is not None:
            lines.append(without)
            continue
        lines += [
            (
                key,
                name,
                digits(m["step_ms"]),
                digits(m["steps_per_second"]),
                digits(m["images_per_second"]),
                f"{m['speedup']:.2f}x",
                f"{m['peak_memory_bytes'] / 2**20:.0f}",
            )
            for name, m in row["models"].items()
        ]
    says = (
        f"Batch {record.facts.get('batch', '')}, autocast, AdamW, float32 weights. The peak is of "
        "one step, with the weights; the optimiser's state, twice the weights, comes on top."
    )
    return [Table(says, columns, lines)]
