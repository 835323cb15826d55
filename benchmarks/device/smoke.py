"""(a) ``pytest -m cuda``: every path that only a GPU takes, once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.device.record import Record, Row
from benchmarks.device.settings import Settings
from benchmarks.device.tables import Table
from benchmarks.runtimes import NotHere

ROOT = Path(__file__).parents[2]


class _Outcomes:
    """What pytest's plugins are told: the outcome of each test, as it comes."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.found: Row = {"passed": 0, "skipped": {}, "failures": {}}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, and keep why it was skipped or failed."""
        if report.skipped:
            self.found["skipped"][report.nodeid] = str(report.longrepr[2])
        elif report.failed:
            self.found["failures"][report.nodeid] = _last_line(report)
        elif report.when == "call":
            self.found["passed"] += 1
        else:
            return
        self.record.rows["so far"] = self.found
        self.record.save()

    def pytest_collectreport(self, report: Any) -> None:
        """Keep what could not be read."""
        if report.failed:
            self.found["failures"][report.nodeid] = _last_line(report)


def _last_line(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None else lines[-1])[:300]


def run(record: Record, settings: Settings) -> None:
    """Run the tests in this process; warnings of newer versions are no failures here."""
    record.rows.pop("so far", None)
    record.attempt("pytest -m cuda", lambda: _pytest(record, settings.sizes.smoke))
    record.rows.pop("so far", None)


def _pytest(record: Record, path: str) -> Row:
    if not find_spec("pytest"):
        raise NotHere("pytest is not installed; pip install pytest")
    if not (ROOT / path).exists():
        raise NotHere(f"there is no '{path}' beside the package; run it from a checkout")
    import pytest

    outcomes = _Outcomes(record)
    how = [
        "-q",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "-o",
        "filterwarnings=default",
    ]
    code = pytest.main([*how, "--rootdir", str(ROOT), str(ROOT / path)], plugins=[outcomes])
    if code in (3, 4):
        raise RuntimeError(f"pytest ended with code {int(code)}; see the step's log")
    return {**outcomes.found, "code": int(code)}


def tables(record: Record) -> list[Table]:
    """Counts, and each test that failed or was skipped."""
    lines = []
    for key, row in record.rows.items():
        if "passed" not in row:
            lines.append((key, str(row.get("not_here") or row.get("failed"))))
            continue
        skipped, failures = row["skipped"], row["failures"]
        counts = f"{row['passed']} passed, {len(failures)} failed, {len(skipped)} skipped"
        lines.append((key, counts))
        lines += [(f"failed: {test}", why) for test, why in failures.items()]
        whys = {why: list(skipped.values()).count(why) for why in skipped.values()}
        lines += [(f"skipped: {count} tests", why) for why, count in whys.items()]
    return [Table("", ("tests", "outcome"), lines)]
