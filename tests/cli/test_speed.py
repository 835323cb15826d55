"""Speed is said as what it is, and agrees with the latencies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.showing.speed import speed_says
from tests.cli.conftest import TINY, Invoke
from tests.cli.test_report import result, write


@pytest.mark.parametrize(
    ("speedup", "interval", "says"),
    [
        (2.0, None, "2.00x faster"),
        (0.8, None, "1.25x slower"),
        (0.8, (0.5, 0.9), "1.25x slower (1.11 to 2.00)"),
        (1.02, (0.98, 1.05), "as fast within the noise, 1.02x (0.98 to 1.05)"),
        (1.001, None, "as fast"),
    ],
)
def test_slower_is_never_called_faster(
    speedup: float, interval: tuple[float, float] | None, says: str
) -> None:
    assert speed_says(speedup, interval) == says


def test_latencies_of_bench_agree_with_its_ratio_and_are_defined(
    invoke: Invoke, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert invoke("prune", *TINY, "--metric=l2", "--out", out).exit_code == 0
    for more in ([], ["--training"]):
        answer = invoke("bench", out, "--seconds=0", *more, "--json")
        assert answer.exit_code == 0, answer.output
        row = json.loads(answer.stdout)
        name = "step_ms" if more else "latency_ms"
        ratio = row["dense"][name] / row["pruned"][name]
        assert ratio == pytest.approx(row["speedup"])
        low, high = row["speedup_interval"]
        assert low <= row["speedup"] <= high
    shown = " ".join(invoke("bench", out, "--seconds=0").stdout.split())
    assert "median of the ratios within rounds" in shown and "±" not in shown


def test_a_study_draws_latencies_that_were_paired(invoke: Invoke, tmp_path: Path) -> None:
    rows = [result("ink", seed, ratio=ratio) for seed, ratio in enumerate((0.25, 0.5))]
    rows[1]["dense"]["latency_ms"] *= 3  # another hour: both models three times slower
    rows[1]["pruned"]["latency_ms"] *= 3
    assert invoke("report", write(tmp_path, *rows)).exit_code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "latency, % of the dense" in page and "latency, ms" not in page
    table = (tmp_path / "report" / "table.csv").read_text().splitlines()
    place = table[0].split(",").index("latency_share")
    assert [float(line.split(",")[place]) for line in table[1:]] == [25, 25]
