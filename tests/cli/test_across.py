from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Invoke


@pytest.mark.parametrize("how", ["variance", "leave-one-out"])
def test_importance_is_combined_across_source_domains(
    invoke: Invoke, data: Path, tmp_path: Path, how: str
) -> None:
    args = ["--data", data, "--target=wool", "--metric=fisher", "--target-macs=0.6", "--json"]
    out = tmp_path / "small"
    result = invoke("prune", *TINY, *args, f"--across-domains={how}", "--out", out)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["across_domains"] == how and row["metric"] == "fisher"
    assert row["pruned"]["macs"] == pytest.approx(0.6 * row["dense"]["macs"], rel=0.02)


def test_run_combines_across_domains_and_says_so(
    invoke: Invoke, data: Path, tmp_path: Path
) -> None:
    args = ["--data", data, "--target=wool", "--metric=taylor", "--ratio=0.3", "--json"]
    quick = ["--epochs=0", "--dense-epochs=0", "--bench-seconds=0.1"]
    out = tmp_path / "run"
    result = invoke("run", *TINY, *args, *quick, "--across-domains=min", "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["across_domains"] == "min"
    again = invoke("run", *TINY, *args, *quick, "--out", out, "--resume")
    assert again.exit_code == 1 and "across_domains" in again.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--metric=fisher"], "say where with --data"),
        (["--metric=l2"], "looks at images, which 'l2' does not"),
        (["--metric=l2", "--data", "DATA"], "looks at images, which 'l2' does not"),
    ],
)
def test_across_domains_without_domains_is_a_usage_error(
    invoke: Invoke, data: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    said = [str(data) if arg == "DATA" else arg for arg in args]
    out = tmp_path / "small"
    result = invoke("prune", *TINY, *said, "--across-domains=min", "--out", out)
    assert result.exit_code in (1, 2) and message in result.stderr and not out.exists()
