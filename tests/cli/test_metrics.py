from __future__ import annotations

import json

import pruners
from cli.options.precision import with_precision
from pruners.registry import METRICS
from tests.cli.conftest import Invoke


def test_metrics_lists_every_metric_with_what_it_needs_and_its_paper(invoke: Invoke) -> None:
    result = invoke("metrics", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["metrics"]}
    assert list(rows) == list(METRICS)
    assert rows["hessian"]["needs_data"] and not rows["lamp"]["needs_data"]
    assert rows["obs"]["additive"] and not rows["l2"]["additive"]
    assert "ICLR 2021" in rows["lamp"]["reference"]
    assert all(row["says"].endswith((".", ":")) for row in rows.values())
    assert all(row["reference"] for name, row in rows.items() if name != "random")


def test_a_users_metric_without_a_docstring_is_listed_too(invoke: Invoke) -> None:
    class Mine(pruners.L1):
        name = "mine"

    Mine.__doc__ = None
    pruners.register(Mine)
    try:
        result = invoke("metrics", "--json")
    finally:
        METRICS.pop("mine")
    row = json.loads(result.stdout)["metrics"][-1]
    assert row["name"] == "mine" and row["says"] == row["reference"] == ""


def test_the_table_is_for_people(invoke: Invoke) -> None:
    result = invoke("metrics")
    assert result.exit_code == 0 and "gauss_newton" in result.stdout


def test_mixed_precision_keeps_what_a_metric_says_of_itself() -> None:
    for name in METRICS:
        metric = pruners.make_metric(name)
        half = with_precision(metric, "cpu", True)
        for said in ("name", "additive", "normalise"):
            assert (getattr(half, said, None) or None) == (getattr(metric, said, None) or None)
